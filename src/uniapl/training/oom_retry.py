"""Split micro-batches that do not fit in memory; the step has the same result with smaller ones."""

from collections.abc import Sequence
from dataclasses import replace

from accelerate.utils import gather_object
from torch import Tensor

from uniapl.data.batching import halves
from uniapl.errors import UniAPLError
from uniapl.training.run import Run
from uniapl.training.update.batch import MixedBatch


def split_micro_batches(
    run: Run, batch: MixedBatch, old_logprobs: Sequence[Tensor] | None = None
) -> tuple[MixedBatch, list[Tensor] | None]:
    """Halve the largest micro-batches, and with them their old log-probabilities; later steps keep the limit.

    Raises:
        UniAPLError: Every micro-batch has one row already.
    """
    largest = max(gather_object([max(part.tokens for part in batch.micro_batches)]))
    # Micro-batches of several rows: the one that did not fit is not necessarily the one with most tokens.
    splittable = [part.tokens for part in batch.micro_batches if len(part.input_ids) > 1]
    limit = max(gather_object([max(splittable, default=0)])) // 2
    if not limit:
        raise UniAPLError(
            f"out of memory in the update: one row of {largest} tokens does not fit; lower "
            "rollout.max_completion_length, data.max_prompt_length or data.max_demonstration_length, "
            "or train a smaller model"
        )
    run.progress.token_limit = limit
    run.view.say(
        f"step {run.step + 1}: out of memory: from now on, micro-batches have at most {limit} tokens "
        f"(batching.max_tokens_per_micro_batch is {run.config.batching.max_tokens_per_micro_batch})"
    )
    parts = [halves(part) if part.tokens > limit else [part] for part in batch.micro_batches]
    split = replace(batch, micro_batches=[half for part in parts for half in part])
    if old_logprobs is None:
        return split, None
    sizes = [[len(half.input_ids) for half in part] for part in parts]
    return split, [half for old, rows in zip(old_logprobs, sizes, strict=True) for half in old.split(rows)]
