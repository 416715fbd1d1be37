"""One update of a trained discriminator."""

from collections.abc import Callable, Mapping, Sequence

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from uniapl.discriminator.bradley_terry import BradleyTerryDiscriminator, Comparison
from uniapl.functional import objective
from uniapl.training.distributed.fsdp import num_empty_micro_batches
from uniapl.training.update.accumulate import accumulate_gradients, finish_update

WEIGHTS = {"pairs": 1.0, "expert": 0.5, "negative": 0.5}
"""Unpaired, demonstrations and negatives have the same weight, independent of their numbers."""


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
    """One update; all processes pass the same comparisons and each computes its part of them.

    Args:
        max_tokens: Upper bound of a batch's tokens; None uses the discriminator's own.

    Returns:
        The loss, the mean over pairs or half of the means over demonstrations and over negatives, and whether
        the update was applied: it is skipped if it is not finite.

    Raises:
        OutOfMemoryError: The same update with a smaller `max_tokens` has the same result.
    """
    local = comparisons[accelerator.process_index :: accelerator.num_processes]
    batch_losses = [*discriminator.losses(local, module, max_tokens=max_tokens)]
    for _ in range(num_empty_micro_batches(accelerator, len(batch_losses))):
        batch_losses += discriminator.losses([], module)
    counts = discriminator.counts(comparisons)
    return weighted_step(
        accelerator, module, optimizer, batch_losses, counts=counts, max_grad_norm=max_grad_norm
    )


def weighted_step(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: Optimizer,
    batch_losses: Sequence[Callable[[], Mapping[str, Tensor]]],
    *,
    counts: Mapping[str, int],
    max_grad_norm: float,
) -> tuple[float, bool]:
    """One update on the weighted means of losses, whose sums over each batch are given.

    Args:
        batch_losses: Each computes the sums over one batch of this process, by the keys of `WEIGHTS`.
        counts: Terms of each sum over all batches and processes.

    Returns:
        See :func:`discriminator_step`.
    """
    measured: list[dict[str, Tensor]] = []

    def loss_of(compute: Callable[[], Mapping[str, Tensor]]) -> Tensor:
        loss = objective(compute(), WEIGHTS, counts)
        measured.append({"loss": loss.detach()})
        return loss

    optimizer.zero_grad()
    accumulate_gradients(accelerator, module, loss_of, batch_losses)
    return finish_update(accelerator, module, optimizer, measured, max_grad_norm=max_grad_norm)


def update_metrics(updates: Sequence[tuple[float, bool]]) -> dict[str, float | None]:
    """Mean loss of a step's updates, and how many were applied and skipped."""
    num_applied = sum(applied for _, applied in updates)
    return {
        "discriminator/loss": sum(loss for loss, _ in updates) / len(updates) if updates else None,
        "discriminator/updates": num_applied,
        "discriminator/skipped": len(updates) - num_applied,
    }
