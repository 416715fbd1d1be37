"""`uniapl.train`: from a configuration to a trained model, stage by stage."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from uniapl.config import Config
from uniapl.config.resolve import Resolved, load_recipe, resolve, stages_of
from uniapl.errors import UniAPLError, UsageError
from uniapl.models.loading import check_vocabulary, load_policy
from uniapl.training.build_sampler import check_processes
from uniapl.training.checkpoint import directory as checkpoint
from uniapl.training.checkpoint import disk as storage
from uniapl.training.checkpoint.run_directory import check_run_directory
from uniapl.training.distributed import fsdp as sharding
from uniapl.training.distributed.accelerator import make_accelerator
from uniapl.training.evaluation import make_evaluate
from uniapl.training.inputs import RunInputs
from uniapl.training.loop import run_stage
from uniapl.training.machine_errors import disk_errors_explained, memory_errors_explained
from uniapl.training.monitor.console import RunView, Show
from uniapl.training.monitor.trackers import check_trackers, tracked
from uniapl.training.preflight import load as setup
from uniapl.training.resume import _bytes_to_write, _load, _resume_state, _stage_start
from uniapl.training.run import Evaluate, ending, save_model, start_run
from uniapl.training.stage import Stage, build_stage


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run leaves behind."""

    output_dir: Path
    final_dir: Path
    """The trained model, as `transformers` loads it."""
    steps: int
    metrics: dict[str, Any]
    """Of the last step."""


def train(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    train_dataset: Iterable[Mapping[str, Any]] | None = None,
    reward_functions: Sequence[Callable[..., Any]] | Callable[..., Any] = (),
    evaluate: Evaluate | None = None,
) -> RunResult:
    """Train, from the first step or from a checkpoint, and leave the result in `output_dir`.

    Args:
        config: A configuration, a mapping with the same keys, or the path of a YAML recipe.
        train_dataset: Rows (a `datasets.Dataset`, a list of dicts), instead of `data.path`.
        reward_functions: Plain callables with TRL's signature, beside those that the configuration names.
        evaluate: Called after each step with the step's number and the model; what it returns is logged with
            the step's metrics, under "eval/". It decides by itself which steps it looks at.

    Raises:
        UsageError: The configuration, the data or the model cannot work; nothing was trained.
        HealthStop: A health rule ended the run; a checkpoint was saved.
        Interrupted: Ctrl-C or SIGTERM did; a checkpoint was saved.
        UniAPLError: The disk is full, read-only or broken, or memory too small; the last checkpoint is whole.
    """
    if isinstance(config, (str, Path)):
        config = load_recipe(config)
    if isinstance(config, Config):
        config = config.model_dump(exclude_unset=True)
    return train_resolved(
        resolve(dict(config)),
        train_dataset=train_dataset,
        reward_functions=reward_functions,
        evaluate=evaluate,
    )


def train_resolved(
    resolved: Resolved,
    *,
    train_dataset: Iterable[Mapping[str, Any]] | None = None,
    reward_functions: Sequence[Callable[..., Any]] | Callable[..., Any] = (),
    evaluate: Evaluate | None = None,
    show: Show = "text",
) -> RunResult:
    """:func:`train` for a configuration whose values have been resolved."""
    config = resolved.config
    check_trackers(config.report_to)
    stages = stages_of(resolved)
    inputs = setup.load_inputs(
        resolved,
        stages,
        train_dataset=train_dataset,
        reward_functions=reward_functions,
        with_suites=config.eval_steps > 0,
    )
    accelerator = make_accelerator(config)
    for stage in stages:
        check_processes(stage.config, accelerator.num_processes)
        if sharding.shards_weights():
            sharding.check_sharding(stage.config)
    view = RunView(sum(s.config.max_steps for s in stages), visible=accelerator.is_main_process, show=show)
    for note in _notes(resolved, stages, inputs, rows_given=train_dataset is not None):
        view.say(f"note: {note}")
    if sharding.shards_weights():
        view.say(
            f"note: FSDP2: {accelerator.num_processes} processes share weights, gradients and optimizers"
        )
    # The first process writes for all.
    alone = storage.exclusive(Path(config.output_dir)) if accelerator.is_main_process else nullcontext()
    with alone:
        return _train_in_directory(resolved, stages, inputs, accelerator, view, evaluate)


def _train_in_directory(
    resolved: Resolved,
    stages: Sequence[Resolved],
    inputs: RunInputs,
    accelerator: Accelerator,
    view: RunView,
    evaluate: Evaluate | None,
) -> RunResult:
    config = resolved.config
    directory = Path(config.output_dir)
    # Everything that can fail comes before the run directory is touched.
    found = checkpoint.find_checkpoint(directory, config.resume, view.say)
    check_run_directory(config, found)
    if config.resume == "auto" and found is None:
        view.say(f"note: no checkpoint in '{directory}': starting from step 1")
    state = _resume_state(found, resolved, stages, inputs, view) if found else {"stage": 0, "step": 0}
    model: Any = load_policy(config.model, found, seed=config.seed).to(accelerator.device)
    check_vocabulary(model, inputs.tokenizer)
    first: int = state["stage"]

    def build(index: int) -> Stage:
        start = _stage_start(index, directory, found)
        stage = build_stage(stages[index].config, index, model, inputs, accelerator, start=start)
        if found and index == first:
            _load(stage, found, state)
        stage.check_sampler()
        return stage

    stage: Stage | None = build(first)
    if accelerator.is_main_process:
        storage.check_space(directory, _bytes_to_write(stages, stage, directory, state, accelerator))
    run = start_run(resolved, stages, accelerator, inputs, view, state)
    last_step = sum(stage.config.max_steps for stage in stages)
    run.evaluate = make_evaluate(config, inputs, accelerator, last_step=last_step, theirs=evaluate)
    view.say(f"resumed at step {run.step} from {found}" if found else f"run directory: {directory}")
    if config.batching.packing and not stage.packing:
        view.say("note: this model's attention cannot read packed rows: updates read padded ones")
    with (
        ending(run),
        disk_errors_explained(directory, started=True),
        memory_errors_explained(view),
        tracked(accelerator, resolved),
        view,
        run.signals_handled(),
    ):
        run_stage(run, stage)
        for index in range(first + 1, len(stages)):
            save_model(run, stage, directory / "stages" / str(index))
            # The old stage's optimizer and discriminator go before the next one's come.
            sharding.gather(model, stage.policy)
            stage = None
            accelerator.free_memory()
            with _mid_run(index):
                stage = build(index)
            run_stage(run, stage)
        save_model(run, stage, directory / "final")
    view.say(f"{run.step} steps done; model: {directory / 'final'}; metrics: {run.metrics_log.path}")
    last = dict(run.history[-1]) if run.history else {}
    return RunResult(output_dir=directory, final_dir=directory / "final", steps=run.step, metrics=last)


def _notes(
    resolved: Resolved, stages: Sequence[Resolved], inputs: RunInputs, *, rows_given: bool
) -> list[str]:
    """What the user should hear of configuration and data before the first step."""
    notes: list[str] = []
    if rows_given and resolved.config.data.path is not None:
        notes.append("data.path is not read, since rows are given")
    notes += dict.fromkeys(note for part in (resolved, *stages) for note in part.notes)
    notes += dict.fromkeys(
        f"rollouts come from the vLLM server {rollout.vllm_server_base_url}, which is waited for up to "
        f"{rollout.vllm_timeout:g} s (rollout.vllm_timeout)"
        for rollout in (stage.config.rollout for stage in stages if stage.config.objective.uses_rollouts)
        if rollout.behind_server
    )
    notes += [
        f"{len(rows)} rows left out, {reason} (uniapl check lists them)"
        for reason, rows in inputs.dataset.left_out.items()
    ]
    return [*notes, *inputs.notes]


@contextmanager
def _mid_run(index: int) -> Iterator[None]:
    """What cannot work in a later stage does not undo the stages before it.

    Raises:
        UniAPLError: Instead of a UsageError.
    """
    try:
        yield
    except UsageError as error:
        raise UniAPLError(
            f"stage {index + 1}: {error}. Once that is mended, --resume auto goes on with this stage"
        ) from error
