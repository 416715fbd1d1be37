"""Gradient norms and cosines of the loss components."""

import itertools
import math

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from uniapl.functional import objective
from uniapl.training.distributed.fsdp import is_sharded, local
from uniapl.training.update.accumulate import accumulate_gradients, reduce_sums
from uniapl.training.update.batch import MixedBatch
from uniapl.training.update.policy_step import LossSettings, component_sums, policy_logprobs
from uniapl.types import MicroBatch

COMPONENTS = ("sft", "rl", "adv", "teacher")
"""The components whose gradients are measured."""


def component_gradient_norms(
    accelerator: Accelerator, policy: nn.Module, batch: MixedBatch, settings: LossSettings
) -> dict[str, float]:
    """Norm of each weighted component's gradient, and the cosines between the gradients.

    Call it before the first update on a batch: it is on-policy, so that no ratio is clipped. It costs a
    forward and a backward pass and the memory of one gradient per component; the policy does not change.

    Returns:
        "grad_norm/<component>" for `COMPONENTS` with a weight and tokens, and "grad_cosine/<one>_<other>" for
        every two of them with a non-zero gradient.

    Raises:
        OutOfMemoryError: The same call with smaller micro-batches has the same result.
    """
    gradients: dict[str, Tensor] = {}
    counts = settings.divisors(batch)
    for name in [name for name in COMPONENTS if batch.weights.get(name) and counts[name]]:

        def loss_of(micro_batch: MicroBatch, name: str = name) -> Tensor:
            logprobs, _, *candidates = policy_logprobs(policy, micro_batch)
            sums = component_sums(logprobs, logprobs.detach(), micro_batch, settings, *candidates)
            return objective({name: sums[name]}, batch.weights, counts)

        accumulate_gradients(accelerator, policy, loss_of, batch.micro_batches)
        trained = [p for p in policy.parameters() if p.requires_grad]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        gradients[name] = torch.cat([local(part).flatten().float() for part in parts])
        policy.zero_grad()
    pairs = [*itertools.combinations(gradients, 2)]
    products = {f"{one}_{other}": gradients[one] @ gradients[other] for one, other in pairs}
    # fp64: the square of an fp32 norm may lose digits or overflow.
    products |= {name: gradient.norm().double() ** 2 for name, gradient in gradients.items()}
    # With FSDP2 each process holds a shard of every gradient, otherwise the complete gradients.
    if is_sharded(policy) and products:
        sums = reduce_sums(accelerator, [products])
    else:
        sums = {name: float(value) for name, value in products.items()}
    norms = {name: math.sqrt(sums[name]) for name in gradients}
    measured = {f"grad_norm/{name}": norm for name, norm in norms.items()}
    for one, other in pairs:
        if norms[one] and norms[other]:
            measured[f"grad_cosine/{one}_{other}"] = sums[f"{one}_{other}"] / (norms[one] * norms[other])
    return measured
