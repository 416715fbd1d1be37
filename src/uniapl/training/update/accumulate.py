"""Backward passes over micro-batches, on one process or several."""

from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

from uniapl.errors import UniAPLError
from uniapl.training.distributed.fsdp import full, is_sharded


class OutOfMemoryError(Exception):
    """A micro-batch did not fit: all processes raise it, and nothing was changed."""


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
            "batching.max_tokens_per_micro_batch; --resume auto goes on from the last checkpoint"
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


def _clip_gradient(accelerator: Accelerator, module: nn.Module, max_norm: float) -> float:
    """The norm before clipping."""
    norm = accelerator.clip_grad_norm_(module.parameters(), max_norm)
    assert norm is not None
    return float(full(norm))


def _add(measured: dict[str, Tensor], name: str, value: Tensor) -> None:
    measured[name] = measured[name] + value if name in measured else value
