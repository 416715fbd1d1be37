"""One update of the policy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from uniapl.functional import (
    clip_counts,
    clipped_surrogate,
    importance_weights,
    k3_kl,
    objective,
    sft_loss,
)
from uniapl.functional.losses import TokenWeight
from uniapl.models.policy import inputs_of
from uniapl.training.update.accumulate import accumulate_gradients, clip_gradient, reduce_sums
from uniapl.training.update.batch import MixedBatch
from uniapl.types import MicroBatch


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Settings of the policy's loss that stay the same throughout a stage."""

    clip_low: float
    clip_high: float
    token_weight: TokenWeight = "none"
    importance_cap: float | None = None
    """Upper bound of the importance weights that correct for a separate sampler; None uses no weights."""
    max_grad_norm: float = math.inf


@dataclass
class PolicyStep:
    """Result of an update."""

    applied: bool
    """False when the loss or the gradient was not finite: the weights are unchanged."""
    grad_norm: float
    """Norm over all parameters, before clipping."""
    sums: dict[str, float]
    """Sums over the step (see `_measure`), and "loss"."""
    old_logprobs: list[Tensor] = field(repr=False)
    """Per micro-batch, the log-probabilities before the first update on these rollouts."""


def policy_step(
    accelerator: Accelerator,
    policy: nn.Module,
    optimizer: Optimizer,
    batch: MixedBatch,
    settings: LossSettings,
    old_logprobs: Sequence[Tensor] | None = None,
) -> PolicyStep:
    """One optimizer step on the mixed batch: one forward and one backward pass per micro-batch.

    Args:
        policy: A (wrapped) :class:`Policy`.
        old_logprobs: Returned by the first update on these rollouts. None means on-policy: the update's own
            log-probabilities, detached, are the old ones.

    Raises:
        OutOfMemoryError: The same step on smaller micro-batches has the same result.
    """
    measured: list[dict[str, Tensor]] = []
    kept: list[Tensor] = []

    def loss_of(number: int) -> Tensor:
        micro_batch = batch.micro_batches[number]
        logprobs, entropy = policy_logprobs(policy, micro_batch)
        old = logprobs.detach() if old_logprobs is None else old_logprobs[number]
        kept.append(old)
        sums = component_sums(logprobs, old, micro_batch, settings)
        if batch.weights["kl"]:
            sums["kl"] = k3_kl(logprobs, micro_batch.ref_logprobs, micro_batch.rollout_mask)
        loss = objective(sums, batch.weights, batch.counts)
        values = {"loss": loss, **sums}
        measured.append(
            {name: value.detach() for name, value in values.items()}
            | _measure(logprobs.detach(), old, entropy, micro_batch, settings)
        )
        return loss

    optimizer.zero_grad()
    accumulate_gradients(accelerator, policy, loss_of, range(len(batch.micro_batches)))
    grad_norm = clip_gradient(accelerator, policy, settings.max_grad_norm)
    sums = reduce_sums(accelerator, measured)
    applied = math.isfinite(sums["loss"]) and math.isfinite(grad_norm)
    # Without an active component there is no gradient, and weight decay alone must not move the policy.
    if applied and any(weight and batch.counts[name] for name, weight in batch.weights.items()):
        optimizer.step()
    optimizer.zero_grad()
    return PolicyStep(applied=applied, grad_norm=grad_norm, sums=sums, old_logprobs=kept)


def policy_logprobs(policy: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Run the policy: log-probabilities and entropies [B, T] of the tokens that enter a loss component."""
    return policy(*inputs_of(batch, batch.sft_mask | batch.rollout_mask))


def component_sums(
    logprobs: Tensor, old: Tensor, batch: MicroBatch, settings: LossSettings
) -> dict[str, Tensor]:
    """Sums of the "sft", "rl" and "adv" components over a micro-batch."""
    clip = {"clip_low": settings.clip_low, "clip_high": settings.clip_high}
    importance = _importance(old, batch, settings)
    adversarial = batch.adversarial_advantages
    return {
        "sft": sft_loss(logprobs, batch.sft_mask, token_weight=settings.token_weight),
        "rl": clipped_surrogate(logprobs, old, batch.advantages, batch.rl_mask, weights=importance, **clip),
        "adv": clipped_surrogate(logprobs, old, adversarial, batch.adv_mask, weights=importance, **clip),
    }


def _importance(old: Tensor, batch: MicroBatch, settings: LossSettings) -> Tensor | None:
    if settings.importance_cap is None:
        return None
    return importance_weights(old, batch.sampling_logprobs, batch.rollout_mask, cap=settings.importance_cap)


def _measure(
    logprobs: Tensor, old: Tensor, entropy: Tensor, batch: MicroBatch, settings: LossSettings
) -> dict[str, Tensor]:
    """Sums over a micro-batch that are logged only; the metrics divide them by the component's count."""
    rollout_mask = batch.rollout_mask
    low, high = clip_counts(
        logprobs,
        old,
        batch.advantages,
        batch.rl_mask,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
    )
    difference = torch.where(rollout_mask, (old - batch.sampling_logprobs).abs(), 0.0)
    sums = {
        "nll": sft_loss(logprobs, batch.sft_mask),
        "rollout_tokens": rollout_mask.sum(),
        "entropy": torch.where(rollout_mask, entropy.detach(), 0.0).sum(),
        "clip_low": low,
        "clip_high": high,
        "sampling_difference": difference.sum(),
        "sampling_difference_max": difference.max(),
    }
    importance = _importance(old, batch, settings)
    if importance is not None:
        sums["importance"] = torch.where(rollout_mask, importance, 0.0).sum()
    return sums
