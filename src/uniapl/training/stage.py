"""What one stage trains: the policy with its optimizer, a reference, an adversary; and how it is saved."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from uniapl.config import Config
from uniapl.data.streams import is_held_out
from uniapl.functional import (
    Multiplier,
    dual_ascent,
    expert_gap,
    learning_rate_factor,
    pid,
    reward_threshold,
    warmup_cosine,
)
from uniapl.models.policy import Policy
from uniapl.models.reference import Reference, reference_at_start, trained_weights
from uniapl.rollout import Sampler
from uniapl.training.adversary import DISCRIMINATOR_OPTIMIZER, Adversary, build_adversary
from uniapl.training.build_sampler import build_sampler
from uniapl.training.checkpoint import directory as checkpoint
from uniapl.training.distributed import fsdp as sharding
from uniapl.training.distributed.one_step_off import Ahead
from uniapl.training.inputs import RunInputs
from uniapl.training.monitor import metrics
from uniapl.training.monitor.early_stopping import Stopping
from uniapl.training.update.activation_checkpointing import checkpointed_layers
from uniapl.training.update.credit import failed_prompts
from uniapl.types import RolloutGroup

POLICY_OPTIMIZER = "policy_optimizer"
"""Files of a checkpoint, without their endings."""
REFERENCE = "reference.safetensors"
"""File of a checkpoint: the weights that the KL stays near, where they are not the stage's start."""


WITH_MOMENTS = 3
"""Weights and AdamW's two moments of them, each as large."""
TOKEN_BYTES = 32
"""Of a rollout's token in state.json: its id, and its log-probability with all digits."""


@dataclass(kw_only=True)
class Stage:
    """One stage of a run: its configuration and everything it changes."""

    config: Config
    index: int
    model: PreTrainedModel
    """The language model inside `policy`, or its twin: what is sampled from and saved."""
    policy: nn.Module
    """What learns. Where it is sharded, `model` has weights inside :meth:`gathered_policy` alone."""
    optimizer: Optimizer
    reference: Reference | None
    """What the KL term stays near; None: there is no such term, or not yet."""
    later_reference: Reference | None
    """What is to be the reference, from `reference_step` on: a run that fits in memory now fits then too."""
    adversary: Adversary | None
    sampler: Sampler
    multiplier: Multiplier
    """lambda_adv, learned or not."""
    step: int = 0
    """Steps of this stage that are done."""
    packing: bool = False
    """Rows are packed: the recipe wants it, and the model can."""
    tokens: int = 0
    """Tokens of completions that this stage has learnt from."""
    stopping: Stopping = field(default_factory=Stopping)

    @property
    def ahead(self) -> Ahead | None:
        """The sampler, where it can begin a step ahead."""
        return self.sampler if isinstance(self.sampler, Ahead) else None

    def check_sampler(self) -> None:
        """Try the sampler, if the stage is still to sample.

        Raises:
            UsageError: It cannot sample from this model, or not here.
        """
        if self.config.objective.uses_rollouts and not self.ended:
            with self.gathered_policy():
                self.sampler.check()

    @property
    def ended(self) -> bool:
        """Its last step is done, or a rule ended it."""
        return self.step >= self.config.max_steps or self.stopping.reason is not None

    @property
    def lambda_adv(self) -> float:
        """The adversary's weight at the current step: none before it is warm, or while it only guesses."""
        settings = self.config.discriminator
        if self.adversary is None or (self.adversary.learner and self.step < settings.warmup_steps):
            return 0.0
        objective = self.config.objective
        # gad: nothing else would move the policy.
        alone = not (objective.learns_from_rewards or objective.learns_from_demonstrations)
        informed = self.adversary.state.accuracy >= settings.min_accuracy
        return self.multiplier.value if informed or alone else 0.0

    def pair_metrics(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Of all fresh pairs, and of those whose demonstrations the discriminator never learns from."""
        unseen = [group for group in groups if is_held_out(group.example, self.config)]
        held_out = {k.replace("/", "/held_out_"): v for k, v in metrics.pair_metrics(unseen).items()}
        return metrics.pair_metrics(groups) | held_out

    def control(self, win_rate: float | None) -> dict[str, float]:
        """Let the multiplier answer to the fresh pairs' mean win rate, and say what it saw; None: no pairs.

        The constraint is on pairs alone: without a demonstration there is no calibrated zero. While the
        adversary is not felt the multiplier waits: a discriminator that only guesses sees no gap.
        """
        objective = self.config.objective
        if win_rate is None or objective.lambda_controller == "fixed":
            return {}
        # Not the gap, which ends at 0: a policy that wins too often lets lambda fall as one that wins too
        # rarely lets it grow. The constraint is the same.
        violation = 0.5 - win_rate - objective.max_expert_gap
        if self.lambda_adv > 0:
            bounds = objective.lambda_bounds
            if objective.lambda_controller == "dual":
                rate = objective.lambda_learning_rate
                self.multiplier = dual_ascent(self.multiplier, violation, learning_rate=rate, bounds=bounds)
            else:
                self.multiplier = pid(self.multiplier, violation, gains=objective.lambda_gains, bounds=bounds)
        return {
            "constraint/expert_gap": expert_gap(win_rate),
            "constraint/violation": violation,
            "constraint/multiplier": self.multiplier.value,
        }

    def mu(self, groups: Sequence[RolloutGroup]) -> float:
        """The demonstrations' weight at the current step, which may depend on how its rollouts fared."""
        objective = self.config.objective
        if objective.mu_controller == "gate":
            return len(failed_prompts(groups, objective.gate_threshold)) / len(groups)
        if objective.mu_controller == "reward":
            rewards = [reward for group in groups for reward in group.rewards if reward is not None]
            if not rewards:
                return objective.mu_peak
            mean = sum(rewards) / len(rewards)
            return reward_threshold(
                mean,
                threshold=objective.mu_threshold,
                peak=objective.mu_peak,
                valley=objective.mu_valley,
            )
        return warmup_cosine(
            self.step,
            warmup_steps=objective.mu_warmup_steps,
            decay_steps=objective.mu_decay_steps,
            peak=objective.mu_peak,
            valley=objective.mu_valley,
        )

    def weights(self, mu: float) -> dict[str, float]:
        """The weight of each component at the current step."""
        objective = self.config.objective
        return {
            "sft": mu,
            "rl": (1 - mu) * objective.reward_weight,
            "adv": self.lambda_adv if objective.adversarial_placement == "loss" else 0.0,
            "kl": objective.beta if self.reference is not None else 0.0,
        }

    def set_reference(self) -> None:
        """From `reference_step` on the reference is the policy as it is then."""
        if self.later_reference is not None and self.step >= self.config.objective.reference_step:
            with self.gathered_policy():
                self.later_reference.follow()
            self.reference, self.later_reference = self.later_reference, None

    def set_learning_rate(self) -> float:
        """Give the optimizer the current step's learning rate."""
        optim = self.config.optim
        rate = optim.learning_rate * learning_rate_factor(
            self.step,
            optim.lr_scheduler_type,
            warmup_steps=optim.warmup_steps,
            total_steps=self.config.max_steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def checkpoint_bytes(self) -> int:
        """What a checkpoint takes on the disk, but for some small files."""
        kept = self.model_bytes() * WITH_MOMENTS
        if self.ahead is not None:
            rollout = self.config.rollout
            rows = self.config.batching.prompts_per_step * rollout.num_generations
            kept += rows * rollout.max_completion_length * TOKEN_BYTES
        referred = self.reference or self.later_reference
        if referred is not None and self.config.objective.reference_step > 0:
            kept += self.model_bytes()
        if self.adversary is not None and self.adversary.learner is not None:
            kept += _bytes(self.adversary.learner.module) * WITH_MOMENTS
        return kept

    def model_bytes(self) -> int:
        """What the policy takes on the disk: all of it, or its adapter."""
        return _bytes(self.policy)

    def merged_bytes(self) -> int:
        """What the policy takes on the disk as a whole model, its adapter merged."""
        return sum(p.nbytes for name, p in self.policy.named_parameters() if ".lora_" not in name)

    @contextlib.contextmanager
    def gathered_policy(self) -> Iterator[None]:
        """`model` with its weights; all processes enter and leave together."""
        with sharding.gathered(self.model, self.policy):
            yield

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """`model` and the discriminator with their weights; all processes enter and leave together."""
        with (
            self.gathered_policy(),
            self.adversary.gathered() if self.adversary else contextlib.nullcontext(),
        ):
            yield

    def optimizer_states(self, *, keep: bool) -> dict[str, Any]:
        """File of a checkpoint -> an optimizer's whole state; all processes ask together, some to keep it."""
        optimizers = {POLICY_OPTIMIZER: self.optimizer}
        if self.adversary is not None and self.adversary.learner is not None:
            optimizers[DISCRIMINATOR_OPTIMIZER] = self.adversary.learner.optimizer
        return {name: sharding.optimizer_state(o, keep=keep) for name, o in optimizers.items()}

    def save(self, directory: Path, optimizers: dict[str, Any]) -> dict[str, Any]:
        """Write all tensors of the stage below `directory`; return the rest, as JSON values.

        Args:
            optimizers: Of :meth:`optimizer_states`.
        """
        for name, optimizer in optimizers.items():
            checkpoint.save_optimizer(optimizer, directory / name)
        state: dict[str, Any] = {
            "stage": self.index,
            "stage_step": self.step,
            "stage_tokens": self.tokens,
            "stopping": asdict(self.stopping),
            "stop_rule": self.config.early_stopping.model_dump(),
        }
        if self.reference is not None and self.config.objective.reference_step > 0:
            self.reference.save(directory / REFERENCE)
        if self.adversary is not None:
            state |= self.adversary.save(directory)
            state["multiplier"] = asdict(self.multiplier)
        if self.ahead is not None:
            state["ahead"] = self.ahead.state()
        return state

    def load(self, directory: Path, state: dict[str, Any]) -> None:
        """The inverse of :meth:`save`; the policy's weights are loaded with the model."""
        self.step = state["stage_step"]
        self.tokens = state["stage_tokens"]
        # A stage that a rule ended goes on under another rule.
        if state["stop_rule"] == self.config.early_stopping.model_dump():
            self.stopping = Stopping(**state["stopping"])
        checkpoint.load_optimizer(self.optimizer, directory / POLICY_OPTIMIZER)
        if self.later_reference is not None and (directory / REFERENCE).exists():
            self.later_reference.load(directory / REFERENCE)
            self.reference, self.later_reference = self.later_reference, None
        if self.adversary is not None:
            self.adversary.load(directory, state)
            # A fixed lambda is the recipe's, whatever it was before.
            if self.config.objective.lambda_controller != "fixed":
                self.multiplier = Multiplier(**state["multiplier"])
        if self.ahead is not None:
            self.ahead.load(state.get("ahead", ()))


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in trained_weights(module).values())


def build_stage(
    config: Config,
    index: int,
    model: PreTrainedModel,
    inputs: RunInputs,
    accelerator: Accelerator,
    *,
    start: Path | None,
) -> Stage:
    """A stage at its first step.

    Args:
        model: The policy's current weights, already on the device.
        start: Directory with the weights that the stage started from; None for the run's own start.
    """
    objective, optim = config.objective, config.optim
    if optim.gradient_checkpointing:
        checkpointed_layers(model)
    inner = Policy(model, accelerator.autocast)
    reference = reference_at_start(inner, config.model, start) if objective.beta > 0 else None
    adversary = None
    if objective.lambda_adv > 0:
        adversary = build_adversary(config, inner, inputs, accelerator, start=start)
    policy, optimizer = sharding.distribute(
        accelerator,
        inner,
        lambda parameters: AdamW(
            parameters,
            lr=optim.learning_rate,
            betas=(optim.adam_beta1, optim.adam_beta2),
            weight_decay=optim.weight_decay,
            fused=True,
        ),
    )
    sampler = build_sampler(config, model, inputs, accelerator)
    sharding.release(model, policy)
    return Stage(
        config=config,
        index=index,
        model=model,
        policy=policy,
        optimizer=optimizer,
        reference=None if objective.reference_step else reference,
        later_reference=reference if objective.reference_step else None,
        adversary=adversary,
        sampler=sampler,
        multiplier=Multiplier(value=objective.lambda_adv),
        packing=config.batching.packing and inner.packs,
    )
