"""Resume a run from a checkpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from uniapl.config.resolve import Resolved
from uniapl.errors import UsageError
from uniapl.models.lora import is_adapter
from uniapl.training.checkpoint.run_directory import RUN_DIRECTORIES, changed_values
from uniapl.training.checkpoint.state import read_state
from uniapl.training.inputs import RunInputs
from uniapl.training.monitor.console import RunView
from uniapl.training.run import discriminator_kind
from uniapl.training.stage import Stage


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
        models += stage.merged_bytes() // (2 if accelerator.mixed_precision == "bf16" else 1)
    folders = [directory / name for name in RUN_DIRECTORIES]
    there = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    return 0 if state.get("finished") else kept * stage.checkpoint_bytes() + models - there


def _resume_state(
    found: Path, resolved: Resolved, stages: Sequence[Resolved], inputs: RunInputs, view: RunView
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
    reason = state["stopping"]["reason"] if state["stop_rule"] == stage.early_stopping.model_dump() else None
    complete = state["stage_step"] >= stage.max_steps
    state["finished"] = reached == len(stages) and (complete or reason is not None)
    if state["finished"]:
        steps = "larger max_steps of its last stage" if len(stages) > 1 else "a larger --max-steps"
        remedy = steps if complete else "another stop rule"
        view.say(f"note: this run is complete{f' ({reason})' if reason else ''}; {remedy} goes on with it")
    for change in changed_values(resolved, stages):
        view.say(f"note: since the run was last started, {change}")
    if state["data_sha256"] != inputs.data_sha256:
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


def _stage_start(index: int, directory: Path, found: Path | None) -> Path | None:
    """Where the weights lie that a stage started from; None for the run's own start."""
    if index == 0:
        return None
    ours = directory / "stages" / str(index)
    return ours if ours.exists() or found is None else found.parent.parent / "stages" / str(index)
