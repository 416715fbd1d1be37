"""One update of the policy and one of the discriminator."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from uniapl.functional import (
    clip_fractions,
    clipped_surrogate,
    importance_weights,
    k3_kl,
    objective,
    sft_loss,
)
from uniapl.functional.losses import TokenWeight
from uniapl.models.policy import inputs_of
from uniapl.training.update.accumulate import _add, _clip_gradient, accumulate_gradients, reduce_sums
from uniapl.types import MicroBatch


@dataclass
class PolicyStep:
    """What an update did."""

    applied: bool
    """False when the loss or the gradient was not finite: the weights are as before."""
    grad_norm: float
    """Before clipping, over all parameters."""
    sums: dict[str, float]
    """Sums over the whole step (see `_measure`), and "loss"."""
    old_logprobs: list[Tensor] = field(repr=False)
    """Per micro-batch, the log-probabilities before the update."""


def policy_step(
    accelerator: Accelerator,
    policy: nn.Module,
    optimizer: Optimizer,
    batches: Sequence[MicroBatch],
    counts: dict[str, int],
    weights: dict[str, float],
    *,
    clip_low: float,
    clip_high: float,
    token_weight: TokenWeight,
    max_grad_norm: float,
    reference: nn.Module | None = None,
    old_logprobs: Sequence[Tensor] | None = None,
    importance_cap: float | None = None,
) -> PolicyStep:
    """One optimizer step on the mixed batch: per micro-batch one forward for all components and one backward.

    Args:
        policy: A (wrapped) :class:`Policy`.
        batches: This process's micro-batches, at least one; with several processes the last one is empty.
        counts: Tokens per component over all micro-batches and processes.
        weights: One per component: "sft", "rl", "adv", "kl".
        reference: The policy that the KL term stays near; needed when the weight of "kl" is positive.
        old_logprobs: From the first update on these rollouts. None means on-policy: the update's own
            log-probabilities, detached, are the old ones.
        importance_cap: Of the weights that correct for a sampler that is another program; None: no weights.

    Raises:
        OutOfMemoryError: The same step on smaller micro-batches has the same result.
    """
    measured: dict[str, Tensor] = {}
    kept: list[Tensor] = []
    clip = {"clip_low": clip_low, "clip_high": clip_high}

    def loss_of(number: int, batch: MicroBatch) -> Tensor:
        logprobs, entropy = _forward(policy, batch)
        old = logprobs.detach() if old_logprobs is None else old_logprobs[number]
        kept.append(old)
        importance = _importance(old, batch, importance_cap)
        sums = _component_sums(logprobs, old, batch, clip, token_weight, importance)
        if reference is not None:
            with torch.no_grad(), accelerator.autocast():
                ref_logprobs, _ = reference(*inputs_of(batch, batch.rollout_mask))
            sums["kl"] = k3_kl(logprobs, ref_logprobs, batch.rollout_mask)
        loss = objective(sums, weights, counts)
        _measure(measured, sums, loss, logprobs.detach(), old, entropy, batch, clip)
        if importance is not None:
            _add(measured, "importance", torch.where(batch.rollout_mask, importance, 0.0).sum())
        return loss

    optimizer.zero_grad()
    losses = (lambda n=n, b=b: loss_of(n, b) for n, b in enumerate(batches))
    accumulate_gradients(accelerator, policy, losses)
    grad_norm = _clip_gradient(accelerator, policy, max_grad_norm)
    sums = reduce_sums(accelerator, measured)
    applied = math.isfinite(sums["loss"]) and math.isfinite(grad_norm)
    # Without an active component there is nothing to learn, and weight decay alone must not move the policy.
    if applied and any(weights[name] and counts[name] for name in weights):
        optimizer.step()
    optimizer.zero_grad()
    return PolicyStep(applied=applied, grad_norm=grad_norm, sums=sums, old_logprobs=kept)


def _forward(policy: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [B, T] of what is learnt from."""
    return policy(*inputs_of(batch, batch.sft_mask | batch.rollout_mask))


def _importance(old: Tensor, batch: MicroBatch, cap: float | None) -> Tensor | None:
    """The tokens' importance weights; None where sampler and trainer are the same program."""
    if cap is None:
        return None
    return importance_weights(old, batch.sampling_logprobs, batch.rollout_mask, cap=cap)


def _component_sums(
    logprobs: Tensor,
    old: Tensor,
    batch: MicroBatch,
    clip: dict[str, float],
    token_weight: TokenWeight,
    weights: Tensor | None,
) -> dict[str, Tensor]:
    """The sum of each of the three forces."""
    adversarial = batch.adversarial_advantages
    return {
        "sft": sft_loss(logprobs, batch.sft_mask, token_weight=token_weight),
        "rl": clipped_surrogate(logprobs, old, batch.advantages, batch.rl_mask, weights=weights, **clip),
        "adv": clipped_surrogate(logprobs, old, adversarial, batch.adv_mask, weights=weights, **clip),
    }


def _measure(
    measured: dict[str, Tensor],
    sums: dict[str, Tensor],
    loss: Tensor,
    logprobs: Tensor,
    old: Tensor,
    entropy: Tensor,
    batch: MicroBatch,
    clip: dict[str, float],
) -> None:
    """Add a micro-batch to the step's sums; whoever logs divides them by the component's count."""
    _add(measured, "loss", loss.detach())
    for name, value in sums.items():
        _add(measured, name, value.detach())
    _add(measured, "nll", sft_loss(logprobs, batch.sft_mask))
    _add(measured, "measured", batch.rollout_mask.sum())
    _add(measured, "entropy", torch.where(batch.rollout_mask, entropy, 0.0).sum())
    low, high = clip_fractions(logprobs, old, batch.advantages, batch.rl_mask, **clip)
    _add(measured, "clip_low", low)
    _add(measured, "clip_high", high)
    difference = torch.where(batch.rollout_mask, (old - batch.sampling_logprobs).abs(), 0.0)
    _add(measured, "sampling_difference", difference.sum())
    highest = difference.max()
    before = measured.get("sampling_difference_max", highest)
    measured["sampling_difference_max"] = torch.maximum(before, highest)
