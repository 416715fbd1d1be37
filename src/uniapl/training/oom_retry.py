"""When a micro-batch does not fit in memory: cut it in two, and do the step again with the same result."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate.utils import gather_object
from torch import Tensor

from uniapl.data.batching import halves
from uniapl.errors import UniAPLError
from uniapl.training.run import Run
from uniapl.training.update.accumulate import OutOfMemoryError
from uniapl.types import MicroBatch

T = TypeVar("T")
OldLogprobs = Sequence[Tensor] | None
"""Of each micro-batch; None before the first update."""


def retry_on_oom(
    run: Run,
    batches: list[MicroBatch],
    old_logprobs: OldLogprobs,
    compute: Callable[[list[MicroBatch], OldLogprobs], T],
) -> tuple[T, list[MicroBatch]]:
    """What `compute` returns, and the micro-batches for which it fitted; later steps are cut as small.

    Raises:
        UniAPLError: One row alone does not fit.
    """
    while True:
        try:
            return compute(batches, old_logprobs), batches
        except OutOfMemoryError:
            pass
        largest = max(gather_object([max(batch.tokens for batch in batches)]))
        # Rows that can be parted: the batch that did not fit need not be the one with most tokens.
        shared = [batch.tokens for batch in batches if len(batch.input_ids) > 1]
        most = max(gather_object([max(shared, default=0)]))
        if not most:
            raise UniAPLError(
                f"out of memory in the update: one row of {largest} tokens does not fit; lower "
                "rollout.max_completion_length, data.max_prompt_length or data.max_demonstration_length, "
                "or train a smaller model"
            )
        limit = most // 2
        pairs = list(zip(batches, old_logprobs or [None] * len(batches), strict=True))
        parts = [part for batch, old in pairs for part in _cut(batch, old, limit)]
        run.token_limit = limit
        run.view.say(
            f"step {run.step + 1}: out of memory: micro-batches of {limit} tokens from here on "
            f"(batching.max_tokens_per_micro_batch is {run.config.batching.max_tokens_per_micro_batch})"
        )
        batches = [batch for batch, _ in parts]
        if old_logprobs is not None:
            old_logprobs = [old for _, old in parts if old is not None]


def _cut(batch: MicroBatch, old: Tensor | None, limit: int) -> list[tuple[MicroBatch, Tensor | None]]:
    if batch.tokens <= limit:
        return [(batch, old)]
    parts = halves(batch)
    sizes = [len(part.input_ids) for part in parts]
    return list(zip(parts, [None] * len(parts) if old is None else old.split(sizes), strict=True))
