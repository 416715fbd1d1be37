"""`uniapl.train`: from a configuration to a trained model, stage by stage."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    set_seed,
)

from uniapl.adapters import is_adapter
from uniapl.config import Config
from uniapl.errors import UniAPLError, UsageError
from uniapl.loading import check_vocabulary, load_policy
from uniapl.resolve import Resolved, load_recipe, resolve, stages_of
from uniapl.train import checkpoint, setup, sharding, storage
from uniapl.train.console import RunView, Show
from uniapl.train.evaluating import make_evaluate
from uniapl.train.loop import run_stage
from uniapl.train.run import Evaluate, discriminator_kind, ending, save_model, start_run
from uniapl.train.sampling import check_processes
from uniapl.train.stage import Stage, build_stage
from uniapl.train.state import read_state
from uniapl.train.trackers import check_trackers, tracked
from uniapl.train.trouble import disk_errors_explained, memory_errors_explained


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
    materials = setup.load_materials(
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
            sharding.check_stage(stage.config)
    view = RunView(sum(s.config.max_steps for s in stages), visible=accelerator.is_main_process, show=show)
    for note in _notes(resolved, stages, materials, rows_given=train_dataset is not None):
        view.say(f"note: {note}")
    if sharding.shards_weights():
        view.say(
            f"note: FSDP2: {accelerator.num_processes} processes share weights, gradients and optimizers"
        )
    # The first process writes for all.
    alone = storage.exclusive(Path(config.output_dir)) if accelerator.is_main_process else nullcontext()
    with alone:
        return _train_in_directory(resolved, stages, materials, accelerator, view, evaluate)


def _train_in_directory(
    resolved: Resolved,
    stages: Sequence[Resolved],
    materials: setup.Materials,
    accelerator: Accelerator,
    view: RunView,
    evaluate: Evaluate | None,
) -> RunResult:
    config = resolved.config
    directory = Path(config.output_dir)
    # Everything that can fail comes before the run directory is touched.
    found = checkpoint.find_checkpoint(directory, config.resume, view.say)
    setup.check_run_directory(config, found)
    if config.resume == "auto" and found is None:
        view.say(f"note: no checkpoint in '{directory}': starting from step 1")
    state = _resume_state(found, resolved, stages, materials, view) if found else {"stage": 0, "step": 0}
    model: Any = load_policy(config.model, found, seed=config.seed).to(accelerator.device)
    check_vocabulary(model, materials.tokenizer)
    first: int = state["stage"]

    def build(index: int) -> Stage:
        start = _stage_start(index, directory, found)
        stage = build_stage(stages[index].config, index, model, materials, accelerator, start=start)
        if found and index == first:
            _load(stage, found, state)
        stage.check_sampler()
        return stage

    stage: Stage | None = build(first)
    if accelerator.is_main_process:
        storage.check_space(directory, _bytes_to_write(stages, stage, directory, state, accelerator))
    run = start_run(resolved, stages, accelerator, materials, view, state)
    last_step = sum(stage.config.max_steps for stage in stages)
    run.evaluate = make_evaluate(config, materials, accelerator, last_step=last_step, theirs=evaluate)
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


def _bytes_to_write(
    stages: Sequence[Resolved],
    stage: Stage,
    directory: Path,
    state: Mapping[str, Any],
    accelerator: Accelerator,
) -> int:
    """What the run's directory will hold at most, less what is there; later stages as large as this one."""
    saves = sum(-(-s.config.max_steps // s.config.save_steps) for s in stages)
    # One more than the limit: the oldest goes when the newest is whole.
    kept = min(stage.config.save_total_limit + 1, saves)
    models = len(stages) * stage.model_bytes()
    if any(s.config.rollout.sampler == "vllm" for s in stages):
        # On their way to vLLM weights are whole, in bf16 where training is.
        models += stage.whole_bytes() // (2 if accelerator.mixed_precision == "bf16" else 1)
    folders = [directory / name for name in setup.RUN_DIRECTORIES]
    there = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    return 0 if state.get("finished") else kept * stage.checkpoint_bytes() + models - there


def _notes(
    resolved: Resolved, stages: Sequence[Resolved], materials: setup.Materials, *, rows_given: bool
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
        for reason, rows in materials.dataset.left_out.items()
    ]
    return [*notes, *materials.notes]


def make_accelerator(config: Config) -> Accelerator:
    """The accelerator of a run: this process's device, precision, and its place among the processes.

    Raises:
        UsageError: It was launched in a way that this version cannot train in.
    """
    bf16 = config.optim.bf16
    if bf16 is None:
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    # The sampler sums probabilities in fp64, which Apple's GPUs do not have.
    device = torch.accelerator.current_accelerator()
    # accelerate keeps the first run's precision for the whole process; the next run may want another.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    sharding.check_launch()
    accelerator = Accelerator(
        cpu=device is None or device.type == "mps",
        mixed_precision="bf16" if bf16 else "no",
        log_with=list(config.report_to) or None,
        project_dir=config.output_dir,
        kwargs_handlers=[
            # The first process evaluates and saves while the others wait, for longer than NCCL's ten minutes.
            InitProcessGroupKwargs(timeout=timedelta(hours=2)),
            # No buffer changes in training; exchanging them would leave behind a process whose forward fails.
            DistributedDataParallelKwargs(broadcast_buffers=False),
        ],
    )
    # Every update is one optimizer step: accelerate must not divide, whatever its environment variables say.
    accelerator.gradient_accumulation_steps = 1
    supported = (
        DistributedType.NO,
        DistributedType.MULTI_CPU,
        DistributedType.MULTI_GPU,
        DistributedType.FSDP,
    )
    if accelerator.distributed_type not in supported:
        raise UsageError(
            f"launched with {accelerator.distributed_type.value}: this version trains on one process, with "
            "DDP or with FSDP2; use torchrun, or a configuration of recipes/accelerate"
        )
    set_seed(config.seed)
    return accelerator


def _resume_state(
    found: Path, resolved: Resolved, stages: Sequence[Resolved], materials: setup.Materials, view: RunView
) -> dict[str, Any]:
    """The state in a checkpoint, if it is one of this run's recipe; what else has changed is said.

    Raises:
        UsageError: Its stages are not this recipe's.
    """
    state = read_state(found)
    methods = [stage.config.method for stage in stages]
    reached = state["stage"] + 1
    if methods[:reached] != state["methods"][:reached]:
        raise UsageError(
            f"checkpoint '{found}' is of a run of {' -> '.join(state['methods'])}, the recipe now says "
            f"{' -> '.join(methods)}; to train on from its weights, give it as model.model_name_or_path"
        )
    lora, adapted = resolved.config.model.lora_r is not None, is_adapter(found)
    if lora != adapted:
        made, says = ("an adapter", "a whole model") if adapted else ("a whole model", "an adapter")
        raise UsageError(
            f"checkpoint '{found}' is of {made}, the recipe trains {says}: change model.lora_r back, or "
            "start anew from its weights by model.model_name_or_path"
        )
    stage = stages[state["stage"]].config
    if stage.objective.lambda_adv > 0 and "adversary" not in state:
        raise UsageError(
            f"checkpoint '{found}' has no discriminator (it was made with lambda_adv 0): set "
            "objective.lambda_adv to 0, or start anew from its weights by model.model_name_or_path"
        )
    kind = discriminator_kind(stage)
    same = {state["kind"], kind} in ({kind}, {"polar", "remote"})
    if stage.objective.lambda_adv > 0 and not same:
        raise UsageError(
            f"checkpoint '{found}' was made with another discriminator than '{kind}': change it back, "
            "or start anew from its weights by model.model_name_or_path"
        )
    reason = state["stopping"]["reason"] if state["stop_rule"] == stage.stop.model_dump() else None
    complete = state["stage_step"] >= stage.max_steps
    state["finished"] = reached == len(stages) and (complete or reason is not None)
    if state["finished"]:
        steps = "larger max_steps of its last stage" if len(stages) > 1 else "a larger --max-steps"
        remedy = steps if complete else "another stop rule"
        view.say(f"note: this run is complete{f' ({reason})' if reason else ''}; {remedy} goes on with it")
    for change in setup.changed_values(resolved, stages):
        view.say(f"note: since the run was last started, {change}")
    if state["data_sha256"] != materials.data_sha256:
        view.say(
            "note: the data has changed since the checkpoint; the streams go on at their positions in it"
        )
    if state["seed"] != resolved.config.seed:
        view.say(
            f"note: the checkpoint's seed was {state['seed']}; from here on it is {resolved.config.seed}"
        )
    return state


def _load(stage: Stage, found: Path, state: dict[str, Any]) -> None:
    try:
        stage.load(found, state)
    except UsageError:
        raise
    except Exception as error:  # tensors of another shape, files and keys that are not there
        raise UsageError(
            f"checkpoint '{found}' does not fit the recipe: {type(error).__name__}: {error!s:.300}; start "
            "anew from its weights by model.model_name_or_path"
        ) from error


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


def _stage_start(index: int, directory: Path, found: Path | None) -> Path | None:
    """Where the weights lie that a stage started from; None for the run's own start."""
    if index == 0:
        return None
    ours = directory / "stages" / str(index)
    return ours if ours.exists() or found is None else found.parent.parent / "stages" / str(index)
