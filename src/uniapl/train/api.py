"""`uniapl.train`: from a configuration to a trained model, stage by stage."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from uniapl.config import Config
from uniapl.resolve import Resolved, load_recipe, resolve, stages_of
from uniapl.train import checkpoint, setup
from uniapl.train.console import RunView
from uniapl.train.loop import run_stage
from uniapl.train.run import save_model, start_run
from uniapl.train.stage import Stage, build_stage


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
    reward_functions: Sequence[Callable[..., Any]] = (),
) -> RunResult:
    """Train, from the first step or from a checkpoint, and leave the result in `output_dir`.

    Args:
        config: A configuration, a mapping with the same keys, or the path of a YAML recipe.
        train_dataset: Rows (a `datasets.Dataset`, a list of dicts), instead of `data.path`.
        reward_functions: Plain callables with TRL's signature, beside those that the configuration names.

    Raises:
        UsageError: The configuration, the data or the model cannot work; nothing was trained.
        HealthStop: A health rule ended the run; a checkpoint was saved.
    """
    if isinstance(config, (str, Path)):
        config = load_recipe(config)
    if isinstance(config, Config):
        config = config.model_dump(exclude_unset=True)
    return train_resolved(
        resolve(dict(config)), train_dataset=train_dataset, reward_functions=reward_functions
    )


def train_resolved(
    resolved: Resolved,
    *,
    train_dataset: Iterable[Mapping[str, Any]] | None = None,
    reward_functions: Sequence[Callable[..., Any]] = (),
) -> RunResult:
    """:func:`train` for a configuration whose values have been resolved."""
    config = resolved.config
    stages = stages_of(resolved)
    materials = setup.load_materials(
        resolved, stages, train_dataset=train_dataset, reward_functions=reward_functions
    )
    bf16 = config.optim.bf16
    if bf16 is None:
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    # The sampler sums probabilities in fp64, which Apple's GPUs do not have.
    device = torch.accelerator.current_accelerator()
    accelerator = Accelerator(
        cpu=device is None or device.type == "mps",
        mixed_precision="bf16" if bf16 else "no",
        # Every update is one optimizer step: accelerate must neither count nor divide.
        gradient_accumulation_steps=1,
    )
    set_seed(config.seed)
    view = RunView(sum(s.config.max_steps for s in stages), visible=accelerator.is_main_process)
    directory = Path(config.output_dir)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            setup.prepare_run_directory(resolved, stages, materials)
    for note in resolved.notes:
        view.say(f"note: {note}")
    found = checkpoint.find_checkpoint(directory, config.resume, view.say)
    state = (
        json.loads((found / "state.json").read_text(encoding="utf-8")) if found else {"stage": 0, "step": 0}
    )
    run = start_run(config, accelerator, materials, directory, view, state)
    model = setup.load_model(config.model, found).to(accelerator.device)
    setup.check_vocabulary(model, materials.tokenizer)
    view.say(f"resumed at step {run.step} from {found}" if found else f"run directory: {directory}")
    stage: Stage | None = None
    with view:
        for index in range(state["stage"], len(stages)):
            start = directory / "stages" / str(index) if index else None
            stage = build_stage(stages[index].config, index, model, materials, accelerator, start=start)
            if found and index == state["stage"]:
                stage.load(found, state)
            run_stage(run, stage)
            if index + 1 < len(stages):
                save_model(run, stage, directory / "stages" / str(index + 1))
                accelerator.free_memory()
        assert stage is not None
        save_model(run, stage, directory / "final")
    view.say(f"{run.step} steps done; model: {directory / 'final'}; metrics: {run.metrics_log.path}")
    return RunResult(
        output_dir=directory, final_dir=directory / "final", steps=run.step, metrics=run.last_metrics
    )
