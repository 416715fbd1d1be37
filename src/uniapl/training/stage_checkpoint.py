"""Save and load a stage as part of a checkpoint."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from uniapl.config import Config
from uniapl.functional import Multiplier
from uniapl.models.reference import trained_weights
from uniapl.training.adversary import DISCRIMINATOR_OPTIMIZER
from uniapl.training.checkpoint.directory import load_optimizer, save_optimizer
from uniapl.training.distributed import fsdp
from uniapl.training.monitor.early_stopping import Stopping
from uniapl.training.stage import Stage

POLICY_OPTIMIZER = "policy_optimizer"
"""Name of the optimizer's checkpoint files, without suffix."""
REFERENCE = "reference.safetensors"
"""File of a checkpoint: the reference's weights, unless they are those that the stage started from."""
TENSORS_PER_WEIGHT = 3
"""A weight and AdamW's two moments, which have its size."""
BYTES_PER_TOKEN = 32
"""Size of a rollout's token in state.json: its id, and its log-probability with all digits."""


@dataclass(frozen=True)
class StageCheckpoint:
    """A stage as it is saved and loaded."""

    stage: Stage

    @property
    def model_bytes(self) -> int:
        """Size of the policy on the disk: the complete model, or its adapter."""
        return _trained_bytes(self.stage.policy)

    @property
    def merged_bytes(self) -> int:
        """Size of the policy on the disk with its adapter merged."""
        parameters = self.stage.policy.named_parameters()
        return sum(parameter.nbytes for name, parameter in parameters if ".lora_" not in name)

    @property
    def num_bytes(self) -> int:
        """Size of a checkpoint on the disk, except for small files."""
        stage, rollout = self.stage, self.stage.config.rollout
        total = self.model_bytes * TENSORS_PER_WEIGHT
        if stage.one_step_off is not None:
            rows = stage.config.batching.prompts_per_step * rollout.num_generations
            total += rows * rollout.max_completion_length * BYTES_PER_TOKEN
        if stage.reference is not None and stage.config.reference_step > 0:
            total += self.model_bytes
        if stage.adversary is not None and stage.adversary.trainer is not None:
            total += _trained_bytes(stage.adversary.trainer.wrapped) * TENSORS_PER_WEIGHT
        return total

    def optimizer_states(self, *, keep: bool) -> dict[str, Any]:
        """File of a checkpoint -> complete state of an optimizer; all processes call it together.

        Args:
            keep: Whether this process receives the states; the others only send their shards.
        """
        optimizers = {POLICY_OPTIMIZER: self.stage.optimizer}
        if self.stage.adversary is not None and self.stage.adversary.trainer is not None:
            optimizers[DISCRIMINATOR_OPTIMIZER] = self.stage.adversary.trainer.optimizer
        return {name: fsdp.optimizer_state(o, keep=keep) for name, o in optimizers.items()}

    def save(self, directory: Path, optimizers: dict[str, Any]) -> dict[str, Any]:
        """Write the tensors of the stage, except the policy's weights; return the rest as JSON values.

        Args:
            optimizers: The result of :meth:`optimizer_states`.
        """
        for name, optimizer in optimizers.items():
            save_optimizer(optimizer, directory / name)
        stage, schedule = self.stage, self.stage.schedule
        state: dict[str, Any] = {
            "stage": stage.index,
            "stage_step": schedule.step,
            "stage_tokens": schedule.completion_tokens,
            "stage_rollouts": schedule.rollouts,
            "stopping": asdict(schedule.stopping),
            "stop_rule": stage.config.early_stopping.model_dump(),
            "cold_start": [stage.config.batching.cold_start_steps, stage.config.cold_start_steps],
        }
        if stage.reference is not None and schedule.uses_reference and stage.config.reference_step:
            stage.reference.save(directory / REFERENCE)
        if stage.adversary is not None:
            state |= stage.adversary.save(directory)
            state["multiplier"] = asdict(schedule.multiplier)
        if stage.one_step_off is not None:
            state["ahead"] = stage.one_step_off.state()
        return state

    def load(self, directory: Path, state: dict[str, Any]) -> None:
        """The inverse of :meth:`save`."""
        stage, schedule = self.stage, self.stage.schedule
        schedule.step = state["stage_step"]
        schedule.completion_tokens = state["stage_tokens"]
        schedule.rollouts = state.get("stage_rollouts", 0)
        # A stage that an early-stopping rule ended continues if the rule has changed.
        schedule.stopping, rule = Stopping(**state["stopping"]), stage.config.early_stopping.model_dump()
        if rule != state["stop_rule"]:
            same = all(rule[key] == state["stop_rule"].get(key) for key in ("metric", "greater_is_better"))
            schedule.stopping = schedule.stopping.restart(same_metric=same)
        _keep_cold_start(stage, state)
        load_optimizer(stage.optimizer, directory / POLICY_OPTIMIZER)
        if stage.reference is not None and not schedule.uses_reference and (directory / REFERENCE).exists():
            stage.reference.load(directory / REFERENCE)
            schedule.uses_reference = True
        if stage.adversary is not None:
            stage.adversary.load(directory, state)
            # A fixed lambda_adv is the recipe's, which may have changed.
            if stage.config.objective.lambda_controller != "fixed":
                schedule.multiplier = Multiplier(**state["multiplier"])
        if stage.one_step_off is not None:
            stage.one_step_off.load(state.get("ahead", ()))


def _keep_cold_start(stage: Stage, state: dict[str, Any]) -> None:
    """A fraction of another number of steps does not move the end of the cold start, nor the reference."""
    setting, steps = state.get("cold_start", (None, None))
    config = stage.config
    if steps is None or setting != config.batching.cold_start_steps or steps == config.cold_start_steps:
        return
    batching = config.batching.model_copy(update={"cold_start_steps": float(steps)})
    stage.schedule.config = config.model_copy(update={"batching": batching})
    stage.schedule.uses_reference = stage.reference is not None and not stage.config.reference_step


def discriminator_kind(config: Config) -> str:
    """The settings of a discriminator that a checkpoint and a recipe must have in common."""
    settings = config.discriminator
    sizes = {"lora_r": settings.lora_r, "num_layers": settings.num_layers}
    named = [settings.kind, *(f"{key} {value}" for key, value in sizes.items() if value is not None)]
    return ", ".join(named + ["in_context_demonstration"] * settings.in_context_demonstration)


def _trained_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in trained_weights(module).values())
