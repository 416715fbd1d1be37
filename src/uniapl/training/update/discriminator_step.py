"""One Bradley-Terry update of the discriminator."""

from collections.abc import Callable, Sequence

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from uniapl.discriminator.bradley_terry import BradleyTerryDiscriminator, Comparison
from uniapl.functional import objective
from uniapl.training.distributed.fsdp import num_empty_micro_batches
from uniapl.training.update.accumulate import accumulate_gradients, finish_update


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
    """One Bradley-Terry update; all processes pass the same comparisons and each computes its part of them.

    Args:
        max_tokens: Upper bound of a batch's tokens; None uses the discriminator's own.

    Returns:
        The loss per pair, and whether the update was applied: it is skipped if it is not finite.

    Raises:
        OutOfMemoryError: The same update with a smaller `max_tokens` has the same result.
    """
    pairs = sum(len(comparison.completions) for comparison in comparisons)
    local = comparisons[accelerator.process_index :: accelerator.num_processes]
    measured: list[dict[str, Tensor]] = []

    def loss_of(compute: Callable[[], Tensor]) -> Tensor:
        loss = objective({"pairs": compute()}, {"pairs": 1.0}, {"pairs": pairs})
        measured.append({"loss": loss.detach()})
        return loss

    optimizer.zero_grad()
    batch_losses = [*discriminator.losses(local, module, max_tokens=max_tokens)]
    for _ in range(num_empty_micro_batches(accelerator, len(batch_losses))):
        batch_losses += discriminator.losses([], module)
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
