"""One update of the policy and one of the discriminator."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.optim import Optimizer

from uniapl.discriminator.bradley_terry import BradleyTerryDiscriminator, Comparison
from uniapl.errors import UniAPLError
from uniapl.functional import (
    clip_fractions,
    clipped_surrogate,
    importance_weights,
    k3_kl,
    objective,
    sft_loss,
)
from uniapl.functional.losses import TokenWeight
from uniapl.train.policy import inputs_of
from uniapl.train.sharding import fillers, full, is_sharded, local
from uniapl.types import MicroBatch


class OutOfMemoryError(Exception):
    """A micro-batch did not fit: all processes raise it, and nothing was changed."""


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
        batches: This process's micro-batches, at least one; of several processes', the last teaches nothing.
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


def measure_forces(
    accelerator: Accelerator,
    policy: nn.Module,
    batches: Sequence[MicroBatch],
    counts: dict[str, int],
    weights: dict[str, float],
    *,
    token_weight: TokenWeight,
    importance_cap: float | None = None,
) -> dict[str, float]:
    """How strongly each force pulls at the weights, and whether they pull the same way.

    Before the first update on a batch: on-policy, so that no clip is active. It costs a forward and a
    backward pass per force, memory for one gradient per force, and changes nothing.

    Args:
        policy: A (wrapped) :class:`Policy`.
        batches: This process's micro-batches, at least one.
        counts: Tokens per component over all micro-batches and processes.
        weights: Of the components; a force's gradient is that of its weighted term.

    Returns:
        "grad_norm/<force>" for "sft", "rl" and "adv" where they act, and "grad_cosine/<one>_<other>" for
        every two of them that have a gradient.
    """
    gradients: dict[str, Tensor] = {}
    for name in [force for force in ("sft", "rl", "adv") if weights[force] and counts[force]]:

        def loss_of(batch: MicroBatch, name: str = name) -> Tensor:
            logprobs, _ = _forward(policy, batch)
            clip = {"clip_low": 1.0, "clip_high": 1.0}
            old = logprobs.detach()
            importance = _importance(old, batch, importance_cap)
            sums = _component_sums(logprobs, old, batch, clip, token_weight, importance)
            return objective({name: sums[name]}, weights, counts)

        accumulate_gradients(accelerator, policy, (lambda b=b: loss_of(b) for b in batches))
        trained = [p for p in policy.parameters() if p.requires_grad]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        gradients[name] = torch.cat([local(part).flatten().float() for part in parts])
        policy.zero_grad()
    pairs = [*itertools.combinations(gradients, 2)]
    products = {f"{one}_{other}": gradients[one] @ gradients[other] for one, other in pairs}
    # Squared in fp64, where nothing is lost by it.
    products |= {name: gradient.norm().double() ** 2 for name, gradient in gradients.items()}
    # With shards every process has a part of each gradient, without them all of it.
    shared = is_sharded(policy) and bool(products)
    sums = reduce_sums(accelerator, products) if shared else {k: float(v) for k, v in products.items()}
    norms = {name: math.sqrt(sums[name]) for name in gradients}
    measured = {f"grad_norm/{name}": norm for name, norm in norms.items()}
    for one, other in pairs:
        if norms[one] and norms[other]:
            measured[f"grad_cosine/{one}_{other}"] = sums[f"{one}_{other}"] / (norms[one] * norms[other])
    return measured


def discriminator_step(
    accelerator: Accelerator,
    discriminator: BradleyTerryDiscriminator,
    module: nn.Module,
    optimizer: Optimizer,
    comparisons: Sequence[Comparison],
    *,
    max_grad_norm: float,
    max_tokens: int | None = None,
) -> tuple[float, bool]:
    """One Bradley-Terry update on comparisons that every process knows, each computing its share.

    Args:
        max_tokens: Of a batch, instead of the discriminator's own.

    Returns:
        The loss per pair, and whether the update was applied (False: not finite, the weights are as before).

    Raises:
        OutOfMemoryError: The same update with a smaller `max_tokens` has the same result.
    """
    pairs = sum(len(comparison.completions) for comparison in comparisons)
    share = comparisons[accelerator.process_index :: accelerator.num_processes]
    measured: dict[str, Tensor] = {}

    def loss_of(compute: Callable[[], Tensor]) -> Tensor:
        loss = objective({"pairs": compute()}, {"pairs": 1.0}, {"pairs": pairs})
        _add(measured, "loss", loss.detach())
        return loss

    optimizer.zero_grad()
    computations = [*discriminator.losses(share, module, max_tokens=max_tokens)]
    for _ in range(fillers(accelerator, len(computations))):
        computations += discriminator.losses([], module)
    losses = (lambda c=c: loss_of(c) for c in computations)
    accumulate_gradients(accelerator, module, losses)
    grad_norm = _clip_gradient(accelerator, module, max_grad_norm)
    loss = reduce_sums(accelerator, measured)["loss"]
    applied = math.isfinite(loss) and math.isfinite(grad_norm)
    if applied:
        optimizer.step()
    optimizer.zero_grad()
    return loss, applied


def accumulate_gradients(
    accelerator: Accelerator, module: nn.Module, losses: Iterable[Callable[[], Tensor]]
) -> None:
    """Backward through every loss; with DDP processes exchange gradients once, in the last backward.

    The losses are already divided by global counts, and DDP averages over processes: hence the factor.

    Args:
        losses: At least one; with DDP the last is so small that it fits in any case, so that all processes
            meet in the exchange. Shards are exchanged in every one: each process has as many.

    Raises:
        OutOfMemoryError: A loss did not fit in the memory of some process; the gradients are worth nothing.
        UniAPLError: The same with shards: a process that falls out of step cannot join the others again.
    """
    if is_sharded(module):
        _accumulate_on_shards(accelerator, losses)
        return
    *those_before, last = losses
    full = False
    try:
        with accelerator.no_sync(module):
            for compute in those_before:
                accelerator.backward(compute() * accelerator.num_processes)
        if accelerator.num_processes == 1:
            accelerator.backward(last())
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        full = True
    if accelerator.num_processes > 1:
        accelerator.backward(last() * accelerator.num_processes)
        anywhere = accelerator.gather(torch.tensor([full], device=accelerator.device))
        assert isinstance(anywhere, Tensor)
        full = bool(anywhere.any())
    if full:
        module.zero_grad()
        clear_device_cache(garbage_collection=True)
        raise OutOfMemoryError


def _accumulate_on_shards(accelerator: Accelerator, losses: Iterable[Callable[[], Tensor]]) -> None:
    try:
        for compute in losses:
            accelerator.backward(compute() * accelerator.num_processes)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise UniAPLError(
            f"out of memory in an update: {error}. With FSDP2 micro-batches are not cut by themselves: lower "
            "batching.max_tokens; --resume auto goes on from the last checkpoint"
        ) from error


def reduce_sums(accelerator: Accelerator, measured: dict[str, Tensor]) -> dict[str, float]:
    """Sums over all processes; keys that end in "_max" take the maximum."""
    names = sorted(measured)
    everywhere = torch.stack([measured[name].cpu().double() for name in names]).unsqueeze(0)
    if accelerator.num_processes > 1:
        gathered = accelerator.gather(everywhere.to(accelerator.device))
        assert isinstance(gathered, Tensor)
        everywhere = gathered
    return {
        name: float(everywhere[:, i].max() if name.endswith("_max") else everywhere[:, i].sum())
        for i, name in enumerate(names)
    }


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


def _clip_gradient(accelerator: Accelerator, module: nn.Module, max_norm: float) -> float:
    """The norm before clipping."""
    norm = accelerator.clip_grad_norm_(module.parameters(), max_norm)
    assert norm is not None
    return float(full(norm))


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


def _add(measured: dict[str, Tensor], name: str, value: Tensor) -> None:
    measured[name] = measured[name] + value if name in measured else value
