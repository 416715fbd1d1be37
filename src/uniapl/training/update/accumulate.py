"""Backward passes over micro-batches, on one process or several."""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.optim import Optimizer

from uniapl.errors import UniAPLError
from uniapl.training.distributed.fsdp import full, is_sharded

Part = TypeVar("Part")


class OutOfMemoryError(Exception):
    """A micro-batch did not fit in memory: all processes raise it, and no weight has changed."""


def accumulate_gradients(
    accelerator: Accelerator, module: nn.Module, loss_of: Callable[[Part], Tensor], parts: Sequence[Part]
) -> None:
    """Backward pass through the loss of every part; DDP exchanges gradients once, in the last pass.

    DDP averages over processes, but the losses are already divided by global counts: each is multiplied by
    the number of processes.

    Args:
        parts: At least one. With DDP the last one must fit in any memory, so that every process takes part in
            the exchange. FSDP2 exchanges in every pass, so every process must have the same number of parts.

    Raises:
        OutOfMemoryError: A part did not fit on some process; the gradients are cleared.
        UniAPLError: The same with FSDP2, where a process that misses an exchange cannot rejoin the others.
    """
    sharded = is_sharded(module)
    ddp = accelerator.num_processes > 1 and not sharded
    out_of_memory = False
    try:
        with contextlib.nullcontext() if sharded else accelerator.no_sync(module):
            for part in parts[:-1] if ddp else parts:
                accelerator.backward(loss_of(part) * accelerator.num_processes)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        if sharded:
            raise UniAPLError(
                f"out of memory in an update: {error}. Micro-batches are not split automatically with FSDP2: "
                "lower batching.max_tokens_per_micro_batch and continue from the last checkpoint with "
                "--resume auto"
            ) from error
        out_of_memory = True
    if ddp:
        accelerator.backward(loss_of(parts[-1]) * accelerator.num_processes)
        gathered = accelerator.gather(torch.tensor([out_of_memory], device=accelerator.device))
        assert isinstance(gathered, Tensor)
        out_of_memory = bool(gathered.any())
    if out_of_memory:
        module.zero_grad()
        clear_device_cache(garbage_collection=True)
        raise OutOfMemoryError


def reduce_sums(accelerator: Accelerator, measured: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Sums over all parts and processes; keys that end in "_max" take the maximum."""
    names = sorted(measured[0])
    totals = [
        functools.reduce(
            torch.maximum if name.endswith("_max") else torch.add, (part[name] for part in measured)
        )
        for name in names
    ]
    everywhere = torch.stack([total.cpu().double() for total in totals]).unsqueeze(0)
    if accelerator.num_processes > 1:
        gathered = accelerator.gather(everywhere.to(accelerator.device))
        assert isinstance(gathered, Tensor)
        everywhere = gathered
    return {
        name: float(everywhere[:, i].max() if name.endswith("_max") else everywhere[:, i].sum())
        for i, name in enumerate(names)
    }


def clip_gradient(accelerator: Accelerator, module: nn.Module, max_norm: float) -> float:
    """Clip the gradient in place; return its norm before clipping."""
    norm = accelerator.clip_grad_norm_(module.parameters(), max_norm)
    assert norm is not None
    return float(full(norm))


def finish_update(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: Optimizer,
    measured: Sequence[Mapping[str, Tensor]],
    *,
    max_grad_norm: float,
) -> tuple[float, bool]:
    """Step on the accumulated gradient, unless it or the loss is not finite.

    Returns:
        The loss, summed over all parts and processes, and whether the step was taken.
    """
    grad_norm = clip_gradient(accelerator, module, max_grad_norm)
    loss = reduce_sums(accelerator, measured)["loss"]
    applied = math.isfinite(loss) and math.isfinite(grad_norm)
    if applied:
        optimizer.step()
    optimizer.zero_grad()
    return loss, applied
