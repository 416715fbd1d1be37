"""What all stages of a run share, and its book-keeping: files, checkpoints, health."""

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedModel

from uniapl.config import Config
from uniapl.config.resolve import Resolved
from uniapl.data.streams import Stream
from uniapl.errors import Interrupted, UniAPLError
from uniapl.files import JsonlLog, write_text
from uniapl.models.lora import save_weights
from uniapl.report import write_report
from uniapl.report.reading import ENDING
from uniapl.training.checkpoint import directory as checkpoint
from uniapl.training.checkpoint import disk as storage
from uniapl.training.checkpoint.model_card import model_card
from uniapl.training.checkpoint.run_directory import prepare_run_directory
from uniapl.training.inputs import RunInputs
from uniapl.training.machine_errors import disk_errors_explained
from uniapl.training.monitor.console import RunView
from uniapl.training.monitor.trackers import track
from uniapl.training.stage import Stage

Evaluate = Callable[[int, PreTrainedModel], Mapping[str, Any]]
"""(step, model) -> what to log of it."""


@dataclass(kw_only=True)
class Run:
    """What all stages of a run share."""

    config: Config
    accelerator: Accelerator
    inputs: RunInputs
    methods: list[str]
    """Of all stages."""
    directory: Path
    view: RunView
    streams: dict[str, Stream]
    metrics_log: JsonlLog
    completions_log: JsonlLog
    health_log: JsonlLog
    """Which rule began to fire in which step, and what it said."""
    step: int = 0
    """Steps done, over all stages."""
    num_tokens: int = 0
    """Tokens of completions that losses were computed on, demonstrations included."""
    bad_steps: dict[str, int] = field(default_factory=dict)
    """What went wrong -> for how many steps in a row: "update", "discriminator", "rewards/<name>"."""
    token_limit: int | None = None
    """Padded tokens of a micro-batch, since a larger one has not fitted in memory."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Metrics of the last steps, oldest first: what the health rules look at."""
    longest_window: int = 1
    """Of the health rules, over all stages."""
    warned: set[str] = field(default_factory=set)
    """Rules that fired in the step before: each is said when it begins, not in every step."""
    evaluate: Evaluate | None = None
    """Looks at the model after each step, in the first process."""
    signal_number: int = 0
    """Of the signal that asked the run to end."""

    def max_tokens(self, stage: Stage) -> int:
        """Padded tokens of a micro-batch at most: the configuration's, or what was found to fit."""
        configured = stage.config.batching.max_tokens_per_micro_batch
        return configured if self.token_limit is None else min(configured, self.token_limit)

    @contextlib.contextmanager
    def signals_handled(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM let the step in progress end and be saved; a second one ends the run at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self.signal_number:
                raise KeyboardInterrupt
            self.signal_number = number
            self.view.say("finishing the step and saving; once more to stop at once")

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def asked_to_stop(self) -> bool:
        """Whether a signal has come, to any process; all of them ask in the same step."""
        self.signal_number = max(gather_object([self.signal_number]))
        return bool(self.signal_number)

    def interrupted(self) -> Interrupted:
        """How a run ends that a signal has stopped."""
        where = checkpoint.checkpoint_path(self.directory, self.step)
        return Interrupted(f"interrupted; --resume auto goes on from {where}", self.signal_number)


def start_run(
    resolved: Resolved,
    stages: Sequence[Resolved],
    accelerator: Accelerator,
    inputs: RunInputs,
    view: RunView,
    state: dict[str, Any],
) -> Run:
    """A run at the state of a checkpoint, or at its beginning; what it finds of later steps is dropped."""
    config = resolved.config
    directory = Path(config.output_dir)
    main = accelerator.is_main_process
    with disk_errors_explained(directory, started=False):
        if main:
            checkpoint.sweep(directory)
            # A finished run is left as it is; config.yaml keeps saying how it was made.
            if not state.get("finished"):
                prepare_run_directory(resolved, stages, inputs)
            checkpoint.forget_after(directory, state["step"])
            # A run that was killed behind its last save has not come to it.
            checkpoint.prune(directory, config.save_total_limit)
            for path in (directory / "skipped").glob("step-*.json"):
                if int(path.stem.removeprefix("step-")) > state["step"]:
                    path.unlink()
        accelerator.wait_for_everyone()
        metrics_log, completions_log, health_log = (
            JsonlLog(directory / name, last_step=state["step"], enabled=main)
            for name in ("metrics.jsonl", "completions.jsonl", "health.jsonl")
        )
    longest_window = max(stage.config.health.window for stage in stages)
    history = metrics_log.tail(2 * longest_window)
    last = history[-1] if history else {}
    return Run(
        config=config,
        accelerator=accelerator,
        inputs=inputs,
        methods=[stage.config.method for stage in stages],
        directory=directory,
        view=view,
        streams={
            name: Stream((), seed=config.seed, name=name, position=state.get(name, 0))
            for name in ("prompts", "demonstrations")
        },
        metrics_log=metrics_log,
        completions_log=completions_log,
        health_log=health_log,
        history=history,
        warned={key.removeprefix("health/") for key in last if key.startswith("health/")},
        longest_window=longest_window,
        step=state["step"],
        num_tokens=state.get("num_tokens", 0),
        bad_steps=state.get("bad_steps", {}),
        token_limit=state["token_limit"]
        if state.get("max_tokens") == config.batching.max_tokens_per_micro_batch
        else None,
    )


def finish_step(
    run: Run, stage: Stage, record: dict[str, Any], completions: list[dict[str, Any]], *, stopping: bool
) -> None:
    """Evaluate, write the step to both files and the console, then save if due or the run is stopping.

    In this order: a run that dies while saving goes on from the checkpoint before and drops these lines.
    """
    if run.evaluate is not None:
        with run.view.phase("evaluate"), stage.gathered_policy():
            found = run.evaluate(run.step, stage.model) if run.accelerator.is_main_process else {}
            # Numbers of NumPy and torch too: rules and JSON know Python's.
            record |= {f"eval/{k}": v.item() if hasattr(v, "item") else v for k, v in found.items()}
        heads = {k: v for k, v in found.items() if k.endswith(("/reward", "/prompt_strict"))}
        if heads:
            run.view.say(f"step {run.step}: {', '.join(f'{k} {v:.3f}' for k, v in heads.items())}")
    rule = stage.config.early_stopping
    watching = rule.target is not None or rule.patience is not None
    # What is evaluated comes in some steps only; whatever else a stage has, it has in its first step.
    if watching and stage.step == 1 and rule.metric not in record and not rule.metric.startswith("eval/"):
        run.view.say(
            f"warning: stop.metric '{rule.metric}' is not among the metrics of the stage's first step"
        )
    stage.stopping.look(rule, record, stage.tokens)
    # Only the first process evaluates: what it decides holds for all.
    (stage.stopping,) = broadcast_object_list([stage.stopping])
    if stage.stopping.reason is not None:
        record["early_stopping/reason"] = stage.stopping.reason
        run.view.say(f"step {run.step}: stage {stage.index + 1} ends: {stage.stopping.reason}")
    record |= {f"time/{name}": seconds for name, seconds in run.view.times.items()}
    record["step_time"] = run.view.step_seconds
    run.metrics_log.write([record])
    run.completions_log.write(completions)
    track(run.accelerator, record)
    run.view.step_done(run.step, record, line=run.step % run.config.logging_steps == 0 or stage.ended)
    if completions and run.config.log_completions_steps and run.step % run.config.log_completions_steps == 0:
        run.view.answers(completions)
    if run.step % run.config.save_steps == 0 or stage.ended or stopping:
        with run.view.phase("save"):
            failure = _land(stage)
            save_checkpoint(run, stage)
        # Where no step follows nobody misses them.
        if failure is not None and not (stage.ended or stopping):
            raise failure


@contextlib.contextmanager
def ending(run: Run) -> Iterator[None]:
    """However the run ends, it is written down; after a crash of the program itself nothing is."""
    try:
        yield
    except Interrupted as interruption:
        end_run(run, "interrupted", str(interruption))
        raise
    except UniAPLError as error:
        end_run(run, "stopped", str(error))
        raise
    end_run(run, "finished")


def end_run(run: Run, state: Literal["finished", "stopped", "interrupted"], message: str = "") -> None:
    """Write down how the run ended, and the page of what it did; a page that fails is no failed run."""
    if not run.accelerator.is_main_process:
        return
    page = run.directory / "report.html"
    try:
        write_text(run.directory / ENDING, json.dumps({"state": state, "message": message}))
        write_report([run.directory], page)
    except Exception as error:  # whatever is wrong with the page, the model is trained and saved
        run.view.say(f"note: no report was written: {error!r}"[:200])
    else:
        run.view.say(f"report: {page}")


def _land(stage: Stage) -> UniAPLError | None:
    """Wait for the next step's rollouts, which a checkpoint holds; if they failed, why."""
    try:
        if stage.ahead is not None:
            stage.ahead.land()
    except UniAPLError as error:
        return error
    return None


def save_checkpoint(run: Run, stage: Stage) -> None:
    """Everything that the run needs to go on as if it had never stopped."""

    def fill(directory: Path) -> None:
        save_weights(stage.model, directory)
        run.inputs.tokenizer.save_pretrained(directory)
        state = {
            "step": run.step,
            "num_tokens": run.num_tokens,
            "bad_steps": run.bad_steps,
            "token_limit": run.token_limit,
            "max_tokens": run.config.batching.max_tokens_per_micro_batch,
            "methods": run.methods,
            "seed": run.config.seed,
            "data_sha256": run.inputs.data_sha256,
            **{name: stream.position for name, stream in run.streams.items()},
            "kind": discriminator_kind(stage.config),
            **stage.save(directory, optimizers),
        }
        (directory / "state.json").write_text(json.dumps(state), encoding="utf-8")

    optimizers = stage.optimizer_states(keep=run.accelerator.is_main_process)
    with stage.gathered():
        if run.accelerator.is_main_process:
            if not storage.has_space(run.directory, stage.checkpoint_bytes()):
                # The newest is whole: it was read back.
                checkpoint.prune(run.directory, 1)
            storage.require_space(run.directory, stage.checkpoint_bytes())
            checkpoint.write_directory(checkpoint.checkpoint_path(run.directory, run.step), fill)
            checkpoint.prune(run.directory, run.config.save_total_limit)
    run.accelerator.wait_for_everyone()


def discriminator_kind(config: Config) -> str:
    """What a checkpoint's discriminator must be for a run to go on with it."""
    settings = config.discriminator
    rank = f", lora_r {settings.lora_r}" if settings.lora_r is not None else ""
    return settings.kind + rank + (", in_context_demonstration" if settings.in_context_demonstration else "")


def save_model(run: Run, stage: Stage, path: Path) -> None:
    """The policy and its tokenizer, as `transformers` loads them, with a card."""

    def fill(directory: Path) -> None:
        save_weights(stage.model, directory)
        run.inputs.tokenizer.save_pretrained(directory)
        last = run.history[-1] if run.history else {}
        card = model_card(run.config, run.methods[: stage.index + 1], run.step, last)
        (directory / "README.md").write_text(card, encoding="utf-8")

    with stage.gathered_policy():
        if run.accelerator.is_main_process:
            checkpoint.write_directory(path, fill)
    run.accelerator.wait_for_everyone()
