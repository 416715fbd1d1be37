"""One update of the policy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from uniapl.functional import (
    cispo_loss,
    clip_counts,
    clipped_surrogate,
    divisors,
    importance_weights,
    k3_kl,
    length_weights,
    objective,
    sampled_reverse_kl,
    sft_loss,
    top_k_reverse_kl,
)
from uniapl.functional.losses import LossType, SamplingLevel, TokenWeight
from uniapl.models.policy import Extras, inputs_of
from uniapl.training.update.accumulate import accumulate_gradients, clip_gradient, reduce_sums
from uniapl.training.update.batch import MixedBatch
from uniapl.types import MicroBatch


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Settings of the policy's loss that stay the same throughout a stage."""

    clip_low: float
    clip_high: float
    """Upper clip width; with loss_type cispo the largest ratio."""
    loss_type: LossType = "dapo"
    max_completion_length: int = 1
    """What dr_grpo divides the sum of each completion by."""
    importance_sampling_level: SamplingLevel = "token"
    token_weight: TokenWeight = "none"
    importance_cap: float | None = None
    """Upper bound of the importance weights that correct for a separate sampler; None uses no weights."""
    max_grad_norm: float = math.inf

    def divisors(self, batch: MixedBatch) -> dict[str, int]:
        """The divisor of each component's sum over the step, and "clip", that of the clip counts."""
        by_sequence = self.importance_sampling_level == "sequence"
        return divisors(
            batch.counts,
            batch.completions,
            loss_type=self.loss_type,
            max_completion_length=self.max_completion_length,
        ) | {"clip": (batch.completions if by_sequence else batch.counts)["kl"]}

    def row_weights(self, mask: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The factor of each token that makes a row's sum its mean (loss_type grpo); None uses no factor."""
        return length_weights(mask, dtype=dtype) if self.loss_type == "grpo" else None


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
    divisors: dict[str, int] = field(default_factory=dict[str, int])
    """See :meth:`LossSettings.divisors`."""


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
    counts = settings.divisors(batch)
    with_entropy = bool(batch.weights.get("entropy"))

    def loss_of(number: int) -> Tensor:
        micro_batch = batch.micro_batches[number]
        logprobs, entropy, *candidates = policy_logprobs(policy, micro_batch, entropy_gradient=with_entropy)
        old = logprobs.detach() if old_logprobs is None else old_logprobs[number]
        kept.append(old)
        sums = component_sums(logprobs, old, micro_batch, settings, *candidates)
        if batch.weights["kl"]:
            mask = micro_batch.rollout_mask
            weights = settings.row_weights(mask, logprobs.dtype)
            sums["kl"] = k3_kl(logprobs, micro_batch.ref_logprobs, mask, weights=weights)
        if with_entropy:
            sums["entropy"] = torch.where(micro_batch.rollout_mask, entropy, 0.0).sum()
        loss = objective(sums, batch.weights, counts)
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
    if applied and any(weight and counts[name] for name, weight in batch.weights.items()):
        optimizer.step()
    optimizer.zero_grad()
    return PolicyStep(applied=applied, grad_norm=grad_norm, sums=sums, old_logprobs=kept, divisors=counts)


def policy_logprobs(
    policy: nn.Module, batch: MicroBatch, *, entropy_gradient: bool = False
) -> tuple[Tensor, ...]:
    """Run the policy: log-probabilities and entropies [B, T] of the tokens that enter a loss component, and
    with `batch.teacher_ids` their log-probabilities [B, T, K]."""
    inputs = inputs_of(batch, batch.sft_mask | batch.rollout_mask)
    return policy(*inputs, Extras(entropy_gradient=entropy_gradient, candidates=batch.teacher_ids))


def component_sums(
    logprobs: Tensor,
    old: Tensor,
    batch: MicroBatch,
    settings: LossSettings,
    candidates: Tensor | None = None,
) -> dict[str, Tensor]:
    """Sums of the "sft", "rl" and "adv" components over a micro-batch, and of "teacher" if it has one.

    Args:
        candidates: The policy's log-probabilities [B, T, K] of `batch.teacher_ids`.
    """
    importance = _importance(old, batch, settings)

    def surrogate(advantages: Tensor, mask: Tensor) -> Tensor:
        weights, level = importance, settings.importance_sampling_level
        lengths = settings.row_weights(mask, logprobs.dtype)
        if lengths is not None:
            weights = lengths if weights is None else weights * lengths
        inputs = (logprobs, old, advantages, mask)
        if settings.loss_type == "cispo":
            return cispo_loss(*inputs, cap=settings.clip_high, weights=weights, level=level)
        clip = {"clip_low": settings.clip_low, "clip_high": settings.clip_high}
        return clipped_surrogate(*inputs, **clip, weights=weights, level=level)

    sums = {
        "sft": sft_loss(logprobs, batch.sft_mask, token_weight=settings.token_weight),
        "rl": surrogate(batch.advantages, batch.rl_mask),
        "adv": surrogate(batch.adversarial_advantages, batch.adv_mask),
    }
    if batch.teacher_logprobs is not None:
        mask, teacher = batch.rollout_mask, batch.teacher_logprobs
        weights = settings.row_weights(mask, logprobs.dtype)
        sums["teacher"] = (
            sampled_reverse_kl(logprobs, old, teacher.squeeze(-1), mask, weights=weights)
            if candidates is None
            else top_k_reverse_kl(candidates, teacher, mask, weights=weights)
        )
    return sums


def _importance(old: Tensor, batch: MicroBatch, settings: LossSettings) -> Tensor | None:
    if settings.importance_cap is None:
        return None
    return importance_weights(old, batch.sampling_logprobs, batch.rollout_mask, cap=settings.importance_cap)


def _measure(
    logprobs: Tensor, old: Tensor, entropy: Tensor, batch: MicroBatch, settings: LossSettings
) -> dict[str, Tensor]:
    """Sums over a micro-batch that are logged only; the metrics divide them by the component's count."""
    rollout_mask = batch.rollout_mask
    # CISPO has no lower bound, and TRL's `cispo_clip_ratio` counts only positive advantages.
    cispo = settings.loss_type == "cispo"
    low, high = clip_counts(
        logprobs,
        old,
        batch.advantages,
        batch.rl_mask,
        clip_low=math.inf if cispo else settings.clip_low,
        clip_high=settings.clip_high - cispo,
        level=settings.importance_sampling_level,
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
    if settings.loss_type == "grpo":
        sums["token_kl"] = k3_kl(logprobs, batch.ref_logprobs, rollout_mask)
    importance = _importance(old, batch, settings)
    if importance is not None:
        sums["importance"] = torch.where(rollout_mask, importance, 0.0).sum()
    return sums
