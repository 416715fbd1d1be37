"""The density ratio of two language models as a discriminator, without a classifier."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from uniapl.data.batching import Row, collate
from uniapl.discriminator import Candidate, batched_logits


@dataclass(frozen=True, kw_only=True)
class DensityRatio:
    """d(x, y) is the mean over tokens of `log p_expert(y_t) - log p_reference(y_t)`, in nats.

    The logit of the optimal discriminator is the log density ratio. A model fine-tuned on the demonstrations
    stands for the expert. The mean is used because a sum rewards length. Source: our choice, a cheap baseline
    for a classifier.
    """

    needs_reference: ClassVar[bool] = False
    expert: nn.Module
    """Called like the policy: (input_ids, attention_mask, position_ids, mask, temperature, spans)."""
    reference: nn.Module
    """The initial or the current policy."""
    pad_id: int
    max_tokens: int
    """Tokens per batch; a batch has at least one row."""
    packed: bool
    """Read packed rows, which both models must support."""
    device: torch.device
    autocast: Callable[..., AbstractContextManager[Any]] = nullcontext

    @torch.no_grad()
    def score(self, candidates: Sequence[Candidate]) -> list[float]:
        """Return the logit of each candidate. See :class:`Discriminator`."""
        components = frozenset({"sft"})
        rows = [
            Row(
                prompt_ids=c.example.prompt_ids,
                completion_ids=c.completion_ids,
                given=c.given,
                components=components,
            )
            for c in candidates
        ]

        def means(indices: list[int]) -> Tensor:
            batch = collate(
                [rows[index] for index in indices], pad_id=self.pad_id, packed=self.packed, device=self.device
            )
            inputs = (batch.input_ids, batch.attention_mask, batch.position_ids)
            inputs = (*inputs, batch.sft_mask, batch.temperature, batch.spans)
            with self.autocast():
                expert, reference = (module(*inputs)[0] for module in (self.expert, self.reference))
            # The log-probabilities are 0 outside the mask.
            return (expert - reference).sum(-1) / batch.sft_mask.sum(-1)

        sequences = [(row.prompt_ids, row.completion_ids) for row in rows]
        return batched_logits(sequences, means, max_tokens=self.max_tokens, packed=self.packed)
