"""A teacher in the training process."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from uniapl.models.policy import Policy, inputs_of
from uniapl.types import MicroBatch


@dataclass(frozen=True, kw_only=True)
class LocalTeacher:
    """Runs the teacher once on every rollout, without gradient. See :class:`uniapl.teacher.Teacher`."""

    model: Policy
    top_k: int
    """Most likely tokens per position; 0 reads the log-probability of the token itself."""
    autocast: Callable[..., AbstractContextManager[Any]] = nullcontext

    @torch.no_grad()
    def read(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """See :meth:`uniapl.teacher.Teacher.read`."""
        return [self._read(batch) for batch in batches]

    def _read(self, batch: MicroBatch) -> MicroBatch:
        # The policy's packed rows, if the teacher can read them; packing does not change the values.
        inputs = batch if self.model.packs else replace(batch, spans=())
        with self.autocast():
            if self.top_k:
                ids, logprobs = self.model.most_likely(inputs, batch.rollout_mask, self.top_k)
                return replace(batch, teacher_ids=ids, teacher_logprobs=logprobs)
            logprobs, _ = self.model(*inputs_of(inputs, batch.rollout_mask))
        return replace(batch, teacher_logprobs=logprobs.unsqueeze(-1))
