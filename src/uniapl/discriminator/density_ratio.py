"""No classifier: how much likelier an answer is to a copy of the policy that has learnt from the expert."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from uniapl.data.batching import Row, batch_sequences, collate
from uniapl.discriminator import Candidate


@dataclass(frozen=True, kw_only=True)
class DensityRatio:
    """d(x, y) is the mean over tokens of `log p_expert(y_t) - log p_against(y_t)`, in nats.

    The best discriminator's logit is the log density ratio. Here a copy that was fine-tuned on the
    demonstrations stands for the expert, and the start or the current policy for the other side. A mean,
    because a sum pays for length. Source: our choice; cheap, and what a classifier has to beat.
    """

    needs_reference: ClassVar[bool] = False
    expert: nn.Module
    """Called as the policy is: (input_ids, attention_mask, position_ids, mask, temperature, spans)."""
    against: nn.Module
    pad_id: int
    max_tokens: int
    """Of one batch at most, one row at least."""
    packed: bool
    """Both can read packed rows, and do."""
    device: torch.device
    autocast: Callable[..., AbstractContextManager[Any]] = nullcontext

    @torch.no_grad()
    def score(self, candidates: Sequence[Candidate]) -> list[float]:
        """The logit of each candidate. See :class:`Discriminator`."""
        spoken = frozenset({"sft"})
        rows = [
            Row(prompt_ids=c.example.prompt_ids, completion_ids=c.completion_ids, components=spoken)
            for c in candidates
        ]
        logits = [0.0] * len(rows)
        sequences = [(row.prompt_ids, row.completion_ids) for row in rows]
        parts = batch_sequences(sequences, max_tokens=self.max_tokens, packed=self.packed)
        for part in parts:
            batch = collate(
                [rows[index] for index in part], pad_id=self.pad_id, packed=self.packed, device=self.device
            )
            place = (batch.input_ids, batch.attention_mask, batch.position_ids)
            inputs = (*place, batch.sft_mask, batch.temperature, batch.spans)
            with self.autocast():
                expert, against = (module(*inputs)[0] for module in (self.expert, self.against))
            # Both are 0 where nothing is masked in.
            means = (expert - against).sum(-1) / batch.sft_mask.sum(-1)
            for index, mean in zip(part, means.tolist(), strict=True):
                logits[index] = mean
        return logits
