"""Where a run starts: at its first step, or at a checkpoint that fits the recipe."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from uniapl.config.flags import flag_of
from uniapl.config.resolve import Resolved
from uniapl.errors import UsageError
from uniapl.models.lora import is_adapter
from uniapl.training.checkpoint import directory as checkpoint_directory
from uniapl.training.checkpoint.run_directory import RUN_DIRECTORIES, changed_values, check_run_directory
from uniapl.training.checkpoint.state import read_state
from uniapl.training.inputs import RunInputs
from uniapl.training.stage import Stage
from uniapl.training.stage_checkpoint import StageCheckpoint, discriminator_kind

RESTART = "Change the recipe back, or start a new run from its weights with model.model_name_or_path"


@dataclass(frozen=True, kw_only=True)
class Start:
    """The point at which a run starts."""

    checkpoint: Path | None
    """None for the first step."""
    state: dict[str, Any]
    """The checkpoint's state.json; "finished" is true if no step remains."""

    @property
    def stage(self) -> int:
        """Index of the stage, counted from 0."""
        return self.state["stage"]

    def stage_weights(self, index: int, directory: Path) -> Path | None:
        """The directory with the weights that a stage started from; None for the run's initial model."""
        if index == 0:
            return None
        ours = directory / "stages" / str(index)
        if ours.exists() or self.checkpoint is None:
            return ours
        return self.checkpoint.parent.parent / "stages" / str(index)

    def load(self, stage: Stage) -> None:
        """Load the checkpoint into its stage; other stages stay at their first step.

        Raises:
            UsageError: Files, keys or shapes do not match.
        """
        if self.checkpoint is None or stage.index != self.stage:
            return
        try:
            StageCheckpoint(stage).load(self.checkpoint, self.state)
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(
                f"checkpoint '{self.checkpoint}' does not fit the recipe: {type(error).__name__}: "
                f"{error!s:.300}. {RESTART}"
            ) from error


def read_start(
    resolved: Resolved,
    stages: Sequence[Resolved],
    inputs: RunInputs,
    say: Callable[[str], None],
    directory: Path,
) -> Start:
    """Find the checkpoint that `resume` asks for and check it against the recipe; report other changes.

    Args:
        directory: The run directory.

    Raises:
        UsageError: There is none that can be used, or `output_dir` holds another run.
    """
    config = resolved.config
    found = checkpoint_directory.find_checkpoint(directory, config.resume, say)
    check_run_directory(config, directory, found)
    if found is None:
        if config.resume == "auto":
            say(f"note: no checkpoint in '{directory}': starting from step 1")
        return Start(checkpoint=None, state={"stage": 0, "step": 0})
    state = read_state(found)
    _check_recipe(found, state, resolved, stages)
    stage = stages[state["stage"]].config
    same_rule = state["stop_rule"] == stage.early_stopping.model_dump()
    reason = state["stopping"].get("reason") if same_rule else None
    complete = state["stage_step"] >= stage.max_steps
    state["finished"] = state["stage"] + 1 == len(stages) and (complete or reason is not None)
    if state["finished"]:
        key = "max_steps" if stages[-1].config.num_train_epochs is None else "num_train_epochs"
        larger = f"a larger {key} of the last stage" if len(stages) > 1 else f"a larger {flag_of([key])}"
        remedy = larger if complete else "another early_stopping rule"
        say(f"note: this run is complete{f' ({reason})' if reason else ''}; to continue it, set {remedy}")
    for change in changed_values(resolved, stages, directory):
        say(f"note: changed since the run was last started: {change}")
    if state["data_sha256"] != inputs.data_sha256:
        say("note: the data has changed since the checkpoint; both streams continue at their positions")
    if state["seed"] != config.seed:
        say(f"note: the seed changes from {state['seed']} (the checkpoint's) to {config.seed}")
    return Start(checkpoint=found, state=state)


def _check_recipe(found: Path, state: dict[str, Any], resolved: Resolved, stages: Sequence[Resolved]) -> None:
    methods, reached = [stage.config.method for stage in stages], state["stage"] + 1
    lora, adapter = resolved.config.model.lora_r is not None, is_adapter(found)
    # A recipe with fewer stages than the checkpoint fails the first check.
    stage = stages[min(state["stage"], len(stages) - 1)].config
    kind, saved = discriminator_kind(stage), state["kind"]
    adversary = stage.objective.lambda_adv > 0
    for wrong, problem in (
        (
            methods[:reached] != state["methods"][:reached],
            f"was made with methods {' -> '.join(state['methods'])}; the recipe has {' -> '.join(methods)}",
        ),
        (lora and not adapter, "contains a complete model; the recipe trains an adapter (model.lora_r)"),
        (adapter and not lora, "contains an adapter; the recipe trains the complete model (model.lora_r)"),
        (adversary and "adversary" not in state, "has no discriminator: its objective.lambda_adv was 0"),
        (
            adversary and kind != saved and {kind, saved} != {"polar", "remote"},
            f"was made with discriminator '{saved}'; the recipe has '{kind}'",
        ),
    ):
        if wrong:
            raise UsageError(f"checkpoint '{found}' {problem}. {RESTART}")


def bytes_to_write(
    stages: Sequence[Resolved], first: StageCheckpoint, start: Start, accelerator: Accelerator
) -> int:
    """Upper bound of the run directory's growth; later stages are assumed to be as large as the first."""
    if start.state.get("finished"):
        return 0
    config = first.stage.config
    saves = sum(-(-stage.config.max_steps // stage.config.save_steps) for stage in stages)
    # One more than the limit: the oldest is deleted after the newest is complete.
    kept = min(config.save_total_limit + 1, saves)
    if config.load_best_model_at_end:
        kept = config.save_total_limit + 2
    models = len(stages) * first.model_bytes
    if any(stage.config.rollout.sampler == "vllm" for stage in stages):
        # vLLM loads merged weights, in bf16 if training uses bf16.
        models += first.merged_bytes // (2 if accelerator.mixed_precision == "bf16" else 1)
    folders = [Path(str(accelerator.project_dir)) / name for name in RUN_DIRECTORIES]
    present = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    return kept * first.num_bytes + models - present
