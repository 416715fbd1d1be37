"""The state shared by all stages, and the end of each step: logs, health checks, evaluation, checkpoints."""

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from uniapl.config import Config
from uniapl.config.resolve import Resolved
from uniapl.data.pass_rates import PassRates
from uniapl.data.streams import Stream
from uniapl.errors import HealthStop, Interrupted, UniAPLError
from uniapl.files import JsonlLog, write_text
from uniapl.models.loading import save_stop_ids
from uniapl.models.lora import save_weights
from uniapl.report import write_report
from uniapl.report.adversary import AdversaryEffect
from uniapl.report.reading import END_STATE
from uniapl.training.checkpoint import directory as checkpoint_directory
from uniapl.training.checkpoint import disk
from uniapl.training.checkpoint.best import check_best, copy_model, name_best
from uniapl.training.checkpoint.model_card import CARD, model_card
from uniapl.training.checkpoint.run_directory import prepare_run_directory, recorded_config
from uniapl.training.distributed.ranks import on_rank_zero
from uniapl.training.evaluation import Evaluation
from uniapl.training.inputs import RunInputs, stream_examples
from uniapl.training.machine_errors import disk_errors_explained
from uniapl.training.monitor.console import RunView
from uniapl.training.monitor.early_stopping import Stopping
from uniapl.training.monitor.record import StepResult, completion_records, step_record
from uniapl.training.monitor.trackers import track
from uniapl.training.resume import Start
from uniapl.training.signals import StopSignal
from uniapl.training.stage import Stage
from uniapl.training.stage_checkpoint import StageCheckpoint, discriminator_kind
from uniapl.training.step_health import SKIPPED, RunHealth


@dataclass(kw_only=True)
class Progress:
    """Counters of a run, over all stages."""

    step: int = 0
    """Finished steps."""
    num_tokens: int = 0
    """Tokens of all steps' rollouts and demonstrations, with the prompt of each."""
    token_limit: int | None = None
    """Token limit per micro-batch, set after an out-of-memory error; None uses the configured limit."""
    adversary: AdversaryEffect = field(default_factory=AdversaryEffect)
    """What the adversary did."""
    streams: dict[str, Stream] = field(default_factory=dict)
    """The streams by name: "prompts" and "demonstrations"."""
    pass_rates: PassRates = field(default_factory=PassRates)
    """Pass rates of the prompts; empty with `prompt_selection: uniform`."""


@dataclass(kw_only=True)
class Run:
    """The state shared by all stages of a run."""

    config: Config
    methods: list[str]
    """The method of each stage."""
    accelerator: Accelerator
    inputs: RunInputs
    view: RunView
    logs: dict[str, JsonlLog]
    """"metrics", "completions" and "health"."""
    progress: Progress
    health: RunHealth
    signal: StopSignal = field(default_factory=StopSignal)
    evaluation: Evaluation | None = None
    """Evaluates the policy after each step."""

    @property
    def step(self) -> int:
        """Finished steps."""
        return self.progress.step

    @property
    def directory(self) -> Path:
        """The run directory, absolute: a reward function may change the working directory."""
        return Path(str(self.accelerator.project_dir))

    def max_tokens(self, stage: Stage) -> int:
        """Token limit per micro-batch: the configured one, or a lower one after an out-of-memory error."""
        configured = stage.config.batching.max_tokens_per_micro_batch
        return min(configured, self.progress.token_limit or configured)

    def open_streams(self, stage: Stage) -> tuple[Stream, Stream]:
        """Open the stage's prompt and demonstration streams at the positions that the run has reached."""
        pools = stream_examples(stage.config, self.inputs.dataset, self.inputs.rewarder)
        opened = self.progress.streams
        for name, pool in zip(("prompts", "demonstrations"), pools, strict=True):
            opened[name] = Stream(pool, seed=self.config.seed, name=name, position=opened[name].position)
        if stage.selects_prompts:
            generations = stage.config.rollout.num_generations
            opened["prompts"].probability = lambda e: self.progress.pass_rates.probability(e, generations)
        return opened["prompts"], opened["demonstrations"]

    def finish_step(self, stage: Stage, result: StepResult) -> None:
        """End a step: update counters, check health, evaluate, log and save.

        A checkpoint is saved if one is due, or if the stage or the run ends. If the run is killed during the
        save, it resumes from the previous checkpoint, and later log lines are removed.
        """
        progress, schedule = self.progress, stage.schedule
        progress.step += 1
        progress.num_tokens += result.num_tokens
        schedule.step += 1
        schedule.rollouts += result.num_rollouts
        schedule.completion_tokens += result.batch.completion_tokens
        record = step_record(
            result,
            stage.config.objective,
            step=self.step,
            stage=stage.index,
            learning_rate=stage.optimizer.param_groups[0]["lr"],
            epoch=progress.streams["prompts" if result.groups else "demonstrations"].epoch,
            num_tokens=progress.num_tokens,
            has_adversary=stage.adversary is not None,
        )
        progress.adversary.add(record)
        record |= self.health.warn(record, stage.config, schedule.step)
        if not result.update.applied:
            self.health.save_skipped(self.step, result, self.inputs)
        problem = self.health.check(self.step, result, stage.config.health.max_skipped_steps)
        # Read once: a signal that arrives during the save stops the run after the next step.
        interrupted = self.signal.received()
        self._evaluate(stage, record)
        self._stop_early(stage, record)
        best = schedule.stopping.best_step == self.step
        self._log(stage, record, completion_records(self.step, result, self.inputs.tokenizer))
        if self.evaluation is not None:
            self.evaluation.report(record)
        last = schedule.ended or bool(problem) or interrupted
        if last or best or self.step % self.config.save_steps == 0:
            with self.view.phase("save"):
                failure = stage.wait_for_rollouts()
                save_checkpoint(self, stage)
            # After the last step no rollouts are needed, so the failure is ignored.
            if failure is not None and not last:
                raise failure
        if problem:
            raise HealthStop(problem)
        if interrupted:
            path = checkpoint_directory.checkpoint_path(self.directory, self.step)
            raise Interrupted(f"interrupted; continue from {path} with --resume auto", self.signal.number)

    def evaluate_start(self, stage: Stage) -> None:
        """Evaluate the model before the first step, and log the scores as step 0."""
        self.view.start_step(0)
        record: dict[str, Any] = {"step": 0, "stage": stage.index}
        self._evaluate(stage, record)
        self._log(stage, record, [])

    def _evaluate(self, stage: Stage, record: dict[str, Any]) -> None:
        if self.evaluation is None:
            return
        with self.view.phase("evaluate"):
            found = self.evaluation.metrics(self.step, stage)
        record |= {f"eval/{name}": value for name, value in found.items()}
        shown = [f"{k} {v:.3f}" for k, v in found.items() if k.endswith(("/reward", "/prompt_strict"))]
        if shown:
            self.view.say(f"step {self.step}: {', '.join(shown)}")

    def _stop_early(self, stage: Stage, record: dict[str, Any]) -> None:
        rule, schedule = stage.config.early_stopping, stage.schedule
        # Of a pipeline, the last stage has the result.
        keeps_best = self.config.load_best_model_at_end and stage.index + 1 == len(self.methods)
        watching = rule.target is not None or rule.patience is not None or keeps_best
        # Evaluation metrics may first appear later; all others exist from the first step with rollouts.
        known = rule.metric in record or rule.metric.startswith("eval/")
        if watching and schedule.step == stage.config.first_rollout_step + 1 and not known:
            where = f"the stage's step {schedule.step}"
            self.view.say(f"warning: early_stopping.metric '{rule.metric}' is not a metric of {where}")
        schedule.stopping.update(rule, record, schedule.completion_tokens, schedule.rollouts)
        # Not at a checkpoint of an interruption: a run that was never stopped does not have it.
        saved = self.step % self.config.save_steps == 0 or schedule.ended
        if keeps_best and (saved or rule.metric.startswith("eval/")):
            schedule.stopping.update_best(rule, record)
        # Times and health warnings may differ between ranks, so rank 0 decides.
        (schedule.stopping,) = broadcast_object_list([schedule.stopping])
        if schedule.stopping.reason is not None:
            record["early_stopping/reason"] = schedule.stopping.reason
            self.view.say(f"step {self.step}: stage {stage.index + 1} ends: {schedule.stopping.reason}")

    def _log(self, stage: Stage, record: dict[str, Any], completions: list[dict[str, Any]]) -> None:
        config, view = self.config, self.view
        record |= {f"time/{name}": seconds for name, seconds in view.times.items()}
        # TRL's step_time is that of the training step, without the evaluation.
        record["step_time"] = view.step_seconds - view.times.get("evaluate", 0.0)
        self.logs["metrics"].write([record])
        self.logs["completions"].write(completions)
        track(self.accelerator, record, view.say)
        view.step_done(self.step, record, line=self.step % config.logging_steps == 0 or stage.schedule.ended)
        if completions and config.log_completions_steps and self.step % config.log_completions_steps == 0:
            view.completions(completions)


def start_run(
    resolved: Resolved,
    stages: Sequence[Resolved],
    accelerator: Accelerator,
    inputs: RunInputs,
    view: RunView,
    start: Start,
    stopping: Stopping,
) -> Run:
    """Create the run at step 0 or from a checkpoint's state, and delete the files of later steps.

    Args:
        stopping: The state of the current stage's rules, which forgets a best checkpoint that is gone.
    """
    directory, state, step = Path(str(accelerator.project_dir)), start.state, start.state["step"]
    config = recorded_config(resolved.config, directory) if state.get("finished") else resolved.config
    window = max(stage.config.health.window for stage in stages)

    def prepare() -> tuple[dict[str, JsonlLog], list[dict[str, Any]], Stopping, str | None]:
        note = check_best(directory, stopping, verified=start.checkpoint)
        with disk_errors_explained(directory, started=False):
            checkpoint_directory.sweep(directory)
            # Keep the config.yaml of a finished run: it records how the model was trained.
            if not state.get("finished"):
                prepare_run_directory(resolved, stages, inputs, directory)
            checkpoint_directory.forget_after(directory, step)
            name_best(directory, stopping, stages[state["stage"]].config.early_stopping.metric)
            _delete_superfluous(directory, config, step)
            logs = _open_logs(directory, step)
            history = [record for record in logs["metrics"].tail(2 * window) if record["step"]]
            return logs, history, stopping, note

    logs, history, checked, note = on_rank_zero(accelerator, prepare)
    vars(stopping).update(vars(checked))
    if note:
        view.say(f"note: {note}")
    for log in logs.values():
        log.enabled = accelerator.is_main_process
    names = ("prompts", "demonstrations")
    same_limit = state.get("max_tokens") == config.batching.max_tokens_per_micro_batch
    return Run(
        config=config,
        methods=[stage.config.method for stage in stages],
        accelerator=accelerator,
        inputs=inputs,
        view=view,
        logs=logs,
        progress=Progress(
            step=step,
            num_tokens=state.get("num_tokens", 0),
            token_limit=state["token_limit"] if same_limit else None,
            adversary=AdversaryEffect(**state.get("adversary_effect", {})),
            streams={n: Stream((), seed=config.seed, name=n, position=state.get(n, 0)) for n in names},
            pass_rates=PassRates(state.get("pass_rates")),
        ),
        health=RunHealth(
            view=view,
            log=logs["health"],
            skipped=directory / SKIPPED,
            window=window,
            history=history,
            bad_steps=state.get("bad_steps", {}),
        ),
    )


def _open_logs(directory: Path, step: int) -> dict[str, JsonlLog]:
    names, last_step = ("metrics", "completions", "health"), step or -1  # step 0 is evaluated again
    return {name: JsonlLog(directory / f"{name}.jsonl", last_step=last_step) for name in names}


def _delete_superfluous(directory: Path, config: Config, step: int) -> None:
    """Delete checkpoints beyond the limit, and skipped batches of steps that the run will repeat."""
    # A run that was killed right after a save may have left too many checkpoints.
    checkpoint_directory.prune(directory, config.save_total_limit)
    for path in (directory / SKIPPED).glob("step-*.json"):
        if int(path.stem.removeprefix("step-")) > step:
            path.unlink()


@contextmanager
def end_state_recorded(run: Run) -> Iterator[None]:
    """Record how the run ended and write its report; write nothing if the exception is no UniAPLError."""
    end: UniAPLError | None = None
    try:
        yield
    except UniAPLError as error:
        end = error
    if run.accelerator.is_main_process:
        stopped = "interrupted" if isinstance(end, Interrupted) else "stopped"
        state = {"state": stopped if end else "finished", "message": str(end or "")}
        page = run.directory / "report.html"
        try:
            write_text(run.directory / END_STATE, json.dumps(state))
            write_report([run.directory], page)
        except Exception as error:  # The model is trained and saved: a failed report does not fail the run.
            run.view.say(f"note: no report was written: {error!r}"[:200])
        else:
            run.view.say(f"report: {page}")
    if end is not None:
        raise end


def save_checkpoint(run: Run, stage: Stage) -> None:
    """Save everything that an exact resume needs."""
    saved = StageCheckpoint(stage)

    def fill(directory: Path) -> None:
        _save_policy(run, stage, directory)
        state = {
            "step": run.step,
            "num_tokens": run.progress.num_tokens,
            "bad_steps": run.health.bad_steps,
            "token_limit": run.progress.token_limit,
            "adversary_effect": asdict(run.progress.adversary),
            "max_tokens": run.config.batching.max_tokens_per_micro_batch,
            "methods": run.methods,
            "seed": run.config.seed,
            "data_sha256": run.inputs.data_sha256,
            **{name: stream.position for name, stream in run.progress.streams.items()},
            **({"pass_rates": rates} if (rates := run.progress.pass_rates.counts) else {}),
            "kind": discriminator_kind(stage.config),
            **saved.save(directory, optimizers),
        }
        (directory / checkpoint_directory.STATE).write_text(json.dumps(state), encoding="utf-8")

    def write() -> None:
        if not disk.has_space(run.directory, saved.num_bytes):
            # Free space: keep only the newest checkpoint, which was verified after writing.
            checkpoint_directory.prune(run.directory, 1)
        disk.require_space(run.directory, saved.num_bytes)
        # After a power failure the logs must not end before the checkpoint.
        for log in run.logs.values():
            log.sync()
        checkpoint_directory.write_directory(
            checkpoint_directory.checkpoint_path(run.directory, run.step), fill
        )
        name_best(run.directory, stage.schedule.stopping, stage.config.early_stopping.metric)
        checkpoint_directory.prune(run.directory, run.config.save_total_limit)

    optimizers = saved.optimizer_states(keep=run.accelerator.is_main_process)
    with stage.gathered_policy(), stage.adversary.gathered() if stage.adversary else nullcontext():
        on_rank_zero(run.accelerator, write)


def save_result(run: Run, stage: Stage, path: Path) -> None:
    """Save the model of the last step, or with `load_best_model_at_end` that of the best checkpoint."""
    stopping, rule = stage.schedule.stopping, stage.config.early_stopping
    step = stopping.best_step if run.config.load_best_model_at_end else None
    if step is None and run.config.load_best_model_at_end:
        run.view.say(
            f"warning: early_stopping.metric '{rule.metric}' had no value at a checkpoint: the result is the "
            "model of the last step"
        )
    if step is None or step == run.step:
        save_model(run, stage, path)
        return
    run.view.say(f"the result is the best checkpoint: step {step}, {rule.metric} {stopping.best_value:.4g}")
    fill = functools.partial(copy_model, checkpoint_directory.checkpoint_path(run.directory, step))
    on_rank_zero(run.accelerator, functools.partial(checkpoint_directory.write_directory, path, fill))


def save_model(run: Run, stage: Stage, path: Path) -> None:
    """Save the policy and its tokenizer in transformers' format, with a model card."""
    fill = functools.partial(_save_policy, run, stage)
    with stage.gathered_policy():
        on_rank_zero(run.accelerator, functools.partial(checkpoint_directory.write_directory, path, fill))


def _save_policy(run: Run, stage: Stage, directory: Path) -> None:
    save_weights(stage.model, directory)
    if run.config.model.stop_tokens:
        save_stop_ids(run.inputs.stop_ids, stage.model, directory)
    run.inputs.tokenizer.save_pretrained(directory)
    card = model_card(
        run.config,
        run.inputs.source,
        run.methods[: stage.index + 1],
        run.step,
        run.health.last_record,
        run.progress.adversary,
        {suite.name: len(suite.examples) for suite in run.inputs.suites},
    )
    (directory / CARD).write_text(card, encoding="utf-8")
