"""Gradient norms and cosines of the loss components."""

import itertools
import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from uniapl.functional import (
    objective,
)
from uniapl.functional.losses import TokenWeight
from uniapl.training.distributed.fsdp import is_sharded, local
from uniapl.training.update.accumulate import accumulate_gradients, reduce_sums
from uniapl.training.update.policy_step import _component_sums, _forward, _importance
from uniapl.types import MicroBatch


def component_gradient_norms(
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
