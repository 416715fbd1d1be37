"""One logistic update of a discriminator's head."""

import functools
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from uniapl.data.batching import batch_by_length
from uniapl.discriminator.head import head_logits
from uniapl.functional import logistic_losses
from uniapl.models.token_states import TokenStates
from uniapl.training.distributed.fsdp import num_empty_micro_batches
from uniapl.training.update.discriminator_step import weighted_step


def head_step(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: Optimizer,
    experts: Sequence[TokenStates],
    negatives: Sequence[TokenStates],
    *,
    counts: dict[str, int],
    max_grad_norm: float,
    max_tokens: int,
) -> tuple[float, bool]:
    """One update; each process passes its part of the completions.

    Args:
        module: The (wrapped) head.
        counts: Numbers of demonstrations ("expert") and negatives ("negative") over all processes.
        max_tokens: Tokens per batch, padding included.

    Returns:
        The loss, and whether the update was applied: it is skipped if it is not finite.

    Raises:
        OutOfMemoryError: The same update with a smaller `max_tokens` has the same result.
    """
    completions = [(item, True) for item in experts] + [(item, False) for item in negatives]
    lengths = [max(1, len(item.logprobs)) for item, _ in completions]
    parts = [[completions[i] for i in batch] for batch in batch_by_length(lengths, max_tokens=max_tokens)]
    parts += [[] for _ in range(num_empty_micro_batches(accelerator, len(parts)))]

    def losses(part: list[tuple[TokenStates, bool]]) -> dict[str, Tensor]:
        device = accelerator.device
        logits = head_logits(module, [item for item, _ in part] or [_nothing(module, device)])
        is_expert = torch.tensor([expert for _, expert in part], dtype=torch.bool, device=device)
        logits = logits[: len(part)]
        expert, negative = logistic_losses(logits[is_expert], logits[~is_expert])
        return {"expert": expert, "negative": negative}

    batch_losses = [functools.partial(losses, part) for part in parts]
    return weighted_step(
        accelerator, module, optimizer, batch_losses, counts=counts, max_grad_norm=max_grad_norm
    )


def _nothing(module: nn.Module, device: torch.device) -> TokenStates:
    """A completion without a loss, for a backward pass in step with the other processes."""
    size = next(p.shape[0] for name, p in module.named_parameters() if name.endswith("norm.weight"))
    zero = torch.zeros(1, device=device)
    return TokenStates(logprobs=zero, states=zero.expand(1, size))
