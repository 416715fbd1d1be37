"""A teacher in the training process."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from uniapl.data.batching import halves
from uniapl.errors import UniAPLError
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
        """See :meth:`uniapl.teacher.Teacher.read`. What does not fit in memory is read in parts.

        Raises:
            UniAPLError: A single row does not fit in memory.
        """
        return [self._read(batch) for batch in batches]

    def _read(self, batch: MicroBatch) -> MicroBatch:
        # The policy's packed rows, if the teacher can read them; packing does not change the values.
        inputs = batch if self.model.packs else replace(batch, spans=())
        try:
            with self.autocast():
                if self.top_k:
                    ids, logprobs = self.model.most_likely(inputs, batch.rollout_mask, self.top_k)
                    return replace(batch, teacher_ids=ids, teacher_logprobs=logprobs)
                logprobs, _ = self.model(*inputs_of(inputs, batch.rollout_mask))
            return replace(batch, teacher_logprobs=logprobs.unsqueeze(-1))
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if len(batch.input_ids) == 1:
                raise UniAPLError(
                    f"out of memory: the teacher cannot read one row of {batch.tokens} tokens; lower "
                    "rollout.max_completion_length or data.max_prompt_length, or serve the teacher with vLLM "
                    "(teacher.url)"
                ) from error
        clear_device_cache(garbage_collection=True)
        parts = [self._read(part) for part in halves(batch)]
        logprobs = torch.cat([part.teacher_logprobs for part in parts if part.teacher_logprobs is not None])
        ids = [part.teacher_ids for part in parts if part.teacher_ids is not None]
        return replace(batch, teacher_logprobs=logprobs, teacher_ids=torch.cat(ids) if ids else None)
