"""`uniapl.train`: from a configuration to a trained model, stage by stage."""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, chdir, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from uniapl.config import Config, ModelConfig
from uniapl.config.resolve import Resolved, load_recipe, merge, resolve, stages_of
from uniapl.errors import UniAPLError, UsageError
from uniapl.models.loading import ModelSource, check_vocabulary, load_model, load_policy
from uniapl.report.verdict import without_gradient
from uniapl.training.build_sampler import check_processes
from uniapl.training.checkpoint import disk
from uniapl.training.distributed import fsdp
from uniapl.training.distributed.accelerator import make_accelerator
from uniapl.training.distributed.ranks import check_agreement, on_rank_zero
from uniapl.training.evaluation import Evaluate, Evaluation
from uniapl.training.given import Given, OnStepEnd, Rows, start_directory
from uniapl.training.inputs import RunInputs
from uniapl.training.loop import run_stage
from uniapl.training.machine_errors import disk_errors_explained, memory_errors_explained
from uniapl.training.monitor.console import RunView
from uniapl.training.monitor.log_view import Show, make_view, progress_bars_hidden
from uniapl.training.monitor.trackers import tracked
from uniapl.training.preflight.checks import check_evaluation
from uniapl.training.preflight.epochs import with_max_steps
from uniapl.training.preflight.load import load_inputs
from uniapl.training.resume import bytes_to_write, read_start
from uniapl.training.run import Run, end_state_recorded, save_model, save_result, start_run
from uniapl.training.stage import Stage, build_stage
from uniapl.training.stage_checkpoint import StageCheckpoint


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Result of a run."""

    output_dir: Path
    final_dir: Path
    """The trained model in transformers' format."""
    steps: int
    metrics: dict[str, Any]
    """Metrics of the last step."""

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """The trained model with any adapter merged, loaded from `final_dir` in fp32 on the CPU."""
        return load_model(ModelSource.resolve(ModelConfig(model_name_or_path=str(self.final_dir))))


def train(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    model: PreTrainedModel | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    train_dataset: Rows | None = None,
    eval_dataset: Rows | Mapping[str, Rows] | None = None,
    reward_functions: Sequence[Callable[..., Any]] | Callable[..., Any] = (),
    evaluate: Evaluate | None = None,
    on_step_end: OnStepEnd | None = None,
    quiet: bool = False,
) -> RunResult:
    """Train a model, from the first step or from a checkpoint, and save it in `output_dir`.

    Progress goes to the logger "uniapl": one INFO record per line that the command line would print, WARNING
    for health warnings. To see it, configure logging: `logging.basicConfig(level="INFO")`.

    Args:
        config: A configuration, a mapping with the same keys, or the path of a YAML recipe.
        model: A model in place of `model.model_name_or_path`. It is saved next to `output_dir`, in a
            directory whose name ends in "-start", and is not changed: the trained one is the result's.
        processing_class: The tokenizer of `model`.
        train_dataset: Rows (a `datasets.Dataset` or a list of dicts) that replace `data.path`.
        eval_dataset: Rows that are evaluated every `eval_steps` steps, in addition to `evaluation.suites`, as
            the suite "eval"; or several such suites by name.
        reward_functions: Callables with TRL's signature, in addition to those that the configuration names.
        evaluate: Called after each step, and with `eval_on_start` as step 0 before the first one, with the
            step's number and the model; the metrics that it returns are logged with the step's metrics, under
            "eval/". It may return {} in most steps.
        on_step_end: Called after each step, before a checkpoint is saved, with the step's metrics as
            metrics.jsonl has them. An error that it raises ends the run.
        quiet: Log nothing, and hide the progress bars of transformers.

    Raises:
        UsageError: The configuration, the data or the model is invalid; nothing was trained.
        HealthStop: A health rule ended the run; a checkpoint was saved.
        Interrupted: Ctrl-C or SIGTERM ended the run; a checkpoint was saved.
        UniAPLError: The disk failed or memory is too small; the last checkpoint is complete.
    """
    path: str | Path | None = None
    if isinstance(config, (str, Path)):
        path, config = config, load_recipe(config)
    if isinstance(config, Config):
        config = config.model_dump(exclude_unset=True)
    resolved = resolve(dict(config), path=path)
    if model is not None:
        if resolved.config.model.model_name_or_path is not None:
            raise UsageError("the model is given twice: remove model.model_name_or_path, or 'model'")
        start = {"model": {"model_name_or_path": str(start_directory(resolved.config))}}
        resolved = resolve(merge(dict(config), start), path=path)
    given = Given(
        model=model,
        processing_class=processing_class,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        reward_functions=reward_functions,
        evaluate=evaluate,
        on_step_end=on_step_end,
    )
    with progress_bars_hidden() if quiet else nullcontext():
        return train_resolved(resolved, given, show="quiet" if quiet else "log")


def train_resolved(resolved: Resolved, given: Given | None = None, *, show: Show = "text") -> RunResult:
    """:func:`train` for a resolved configuration; by default it prints to the console."""
    given = given or Given()
    config = resolved.config
    stages = stages_of(resolved)
    accelerator = _launched(config, stages)
    directory = Path(str(accelerator.project_dir))
    given.check(config)
    check_evaluation(stages[-1].config, has_function=given.evaluate is not None)
    on_rank_zero(accelerator, lambda: given.save_model(config))
    inputs = _load(resolved, stages, accelerator, given)
    stages = [with_max_steps(stage, inputs.dataset, inputs.rewarder) for stage in stages]
    if not config.stages:
        (resolved,) = stages
    num_steps = sum(stage.config.max_steps for stage in stages)
    view = make_view(num_steps, visible=accelerator.is_main_process, show=show)
    if given.train_dataset is not None and config.data.path is not None:
        view.say("note: data.path is ignored because train_dataset is given")
    for note in _notes(resolved, stages, inputs, accelerator):
        view.say(f"note: {note}")
    with ExitStack() as locked:
        # Only the main process writes to the directory.
        on_rank_zero(accelerator, lambda: locked.enter_context(disk.exclusive(directory)))
        build, run, stage = _start(resolved, stages, inputs, accelerator, view)
        run.evaluation = Evaluation(
            config=config,
            inputs=inputs,
            accelerator=accelerator,
            last_step=num_steps,
            custom=given.evaluate,
            on_step_end=given.on_step_end,
        )
        with (
            end_state_recorded(run),
            disk_errors_explained(directory, started=True),
            memory_errors_explained(view),
            tracked(accelerator, resolved, view.say),
            view,
            run.signal.handled(view.say),
        ):
            if config.eval_on_start and run.step == 0:
                run.evaluate_start(stage)
            run_stage(run, stage)
            for index in range(stage.index + 1, len(stages)):
                save_model(run, stage, directory / "stages" / str(index))
                # Free the old stage's optimizer and discriminator before the next ones are built.
                fsdp.gather(stage.model, stage.policy)
                del stage
                accelerator.free_memory()
                stage = build(index)
                run_stage(run, stage)
            save_result(run, stage, directory / "final")
    _show_end(run, Path(config.output_dir))
    return RunResult(
        output_dir=directory, final_dir=directory / "final", steps=run.step, metrics=run.health.last_record
    )


def _show_end(run: Run, shown: Path) -> None:
    """Print what the adversary did, whether the run trained on nothing, and where its files are."""
    say = run.view.say
    if (effect := run.progress.adversary.sentence) is not None:
        say(effect)
    if run.accelerator.is_main_process and (reason := without_gradient(run.logs["metrics"].tail(run.step))):
        say(f"warning: {reason}")
    say(f"{run.step} steps done; model: {shown / 'final'}; metrics: {shown / 'metrics.jsonl'}")


def _launched(config: Config, stages: Sequence[Resolved]) -> Accelerator:
    """The accelerator of a run, which all ranks were started for in a way that its stages support."""
    accelerator = make_accelerator(config)
    check_agreement(accelerator, "the recipe", (stage.config for stage in stages))
    for stage in stages:
        check_processes(stage.config, accelerator.num_processes)
        if fsdp.shards_weights():
            fsdp.check_sharding(stage.config)
    return accelerator


def _load(
    resolved: Resolved,
    stages: Sequence[Resolved],
    accelerator: Accelerator,
    given: Given,
) -> RunInputs:
    """The inputs of a run, on which all ranks agree."""
    # Reward functions are tried, and may change the working directory, to which paths are relative.
    with chdir("."):
        inputs = load_inputs(
            resolved,
            stages,
            given,
            with_suites=resolved.config.eval_steps > 0,
            once=functools.partial(on_rank_zero, accelerator),
        )
    examples = inputs.dataset.examples
    check_agreement(accelerator, "the data", ((e.prompt_ids, e.demonstration_ids) for e in examples))
    return inputs


def _start(
    resolved: Resolved,
    stages: Sequence[Resolved],
    inputs: RunInputs,
    accelerator: Accelerator,
    view: RunView,
) -> tuple[Callable[[int], Stage], Run, Stage]:
    """(builder of the stages, run, its current stage): everything that can fail before the first step."""
    config, directory, working_directory = resolved.config, Path(str(accelerator.project_dir)), Path.cwd()
    start = on_rank_zero(accelerator, lambda: read_start(resolved, stages, inputs, view.say, directory))
    source = inputs.source.with_weights(start.checkpoint)
    model: Any = load_policy(source, config.model, seed=config.seed).to(accelerator.device)
    check_vocabulary(model, inputs.tokenizer)

    def build(index: int) -> Stage:
        weights = start.stage_weights(index, directory)
        try:
            with chdir(working_directory):
                stage = build_stage(stages[index].config, index, model, inputs, accelerator, start=weights)
                start.load(stage)
                stage.check_sampler()
        except UsageError as error:
            if index == start.stage:
                raise
            # The stages before are trained and saved, so that this is not an error of usage any more.
            raise UniAPLError(
                f"stage {index + 1}: {error}. Fix it and continue with this stage by --resume auto"
            ) from error
        return stage

    stage = build(start.stage)
    needed = bytes_to_write(stages, StageCheckpoint(stage), start, accelerator)
    on_rank_zero(accelerator, lambda: disk.check_space(directory, needed))
    # The run directory is changed from here on.
    run = start_run(resolved, stages, accelerator, inputs, view, start, stage.schedule.stopping)
    found = start.checkpoint
    view.say(f"resumed at step {run.step} from {found}" if found else f"run directory: {config.output_dir}")
    if config.batching.packing and not stage.packing:
        view.say("note: the model's attention does not support packing: micro-batches are padded")
    return build, run, stage


def _notes(
    resolved: Resolved, stages: Sequence[Resolved], inputs: RunInputs, accelerator: Accelerator
) -> list[str]:
    """Notes about configuration and data, shown before the first step."""
    notes = [*dict.fromkeys(note for part in (resolved, *stages) for note in part.notes)]
    notes += dict.fromkeys(
        f"rollouts come from the vLLM server {rollout.vllm_server_base_url}; the timeout is "
        f"{rollout.vllm_timeout:g} s (rollout.vllm_timeout)"
        for rollout in (stage.config.rollout for stage in stages if stage.config.objective.uses_rollouts)
        if rollout.behind_server
    )
    notes += [
        f"{len(rows)} rows left out, {reason} (uniapl check lists them)"
        for reason, rows in inputs.dataset.left_out.items()
    ]
    notes += inputs.notes
    if fsdp.shards_weights():
        processes = accelerator.num_processes
        notes.append(f"FSDP2 shards parameters, gradients and optimizer state over {processes} processes")
    return notes
