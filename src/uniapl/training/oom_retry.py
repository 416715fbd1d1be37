"""Split micro-batches that do not fit in memory; the step has the same result with smaller ones."""

from collections.abc import Sequence
from dataclasses import replace

from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from uniapl.data.batching import halves, rows_of_halves
from uniapl.errors import UniAPLError
from uniapl.models.token_states import TokenReader, TokenStates
from uniapl.teacher import Teacher
from uniapl.training.run import Run
from uniapl.training.update.batch import MixedBatch
from uniapl.types import MicroBatch, Tokens


def split_micro_batches(
    run: Run, batch: MixedBatch, old_logprobs: Sequence[Tensor] | None = None
) -> tuple[MixedBatch, list[Tensor] | None]:
    """Halve the largest micro-batches, and with them their old log-probabilities; later steps keep the limit.

    Raises:
        UniAPLError: Every micro-batch has one row, or one preference pair, already.
    """
    largest = max(gather_object([max(part.tokens for part in batch.micro_batches)]))
    # Micro-batches of several rows: the one that did not fit is not necessarily the one with most tokens.
    splittable = [part.tokens for part in batch.micro_batches if len(rows_of_halves(part)) > 1]
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
    divided = zip(batch.micro_batches, old_logprobs, strict=True)
    return split, [
        half
        for part, old in divided
        for half in ([old[rows] for rows in rows_of_halves(part)] if part.tokens > limit else [old])
    ]


def read_in_parts(reader: TokenReader, sequences: Sequence[Tokens]) -> list[TokenStates]:
    """:meth:`TokenReader.read`, in halves if the sequences do not fit in memory at once.

    No other process takes part, so that each one splits by itself.

    Raises:
        UniAPLError: A single sequence does not fit.
    """
    try:
        return reader.read(sequences)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        if len(sequences) == 1:
            tokens = sum(map(len, sequences[0].pair))
            raise UniAPLError(
                f"out of memory: the KL reference cannot read one completion of {tokens} tokens with its "
                "prompt; lower rollout.max_completion_length or data.max_prompt_length, or train a smaller "
                "model"
            ) from error
    clear_device_cache(garbage_collection=True)
    middle = len(sequences) // 2
    return [*read_in_parts(reader, sequences[:middle]), *read_in_parts(reader, sequences[middle:])]


def teach_in_parts(teacher: Teacher, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """:meth:`Teacher.read`, in halves of a micro-batch if it does not fit in memory.

    No other process takes part, so that each one splits by itself.

    Raises:
        UniAPLError: A single row does not fit.
    """
    try:
        return teacher.read(batches)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        if len(batches) == 1 and len(rows_of_halves(batches[0])) == 1:
            raise UniAPLError(
                f"out of memory: the teacher cannot read one row of {batches[0].tokens} tokens; lower "
                "rollout.max_completion_length or data.max_prompt_length, or serve the teacher with vLLM "
                "(teacher.url)"
            ) from error
    clear_device_cache(garbage_collection=True)
    if len(batches) > 1:
        return [taught for batch in batches for taught in teach_in_parts(teacher, [batch])]
    (batch,) = batches
    parts = [taught for half in halves(batch) for taught in teach_in_parts(teacher, [half])]

    def joined(found: Sequence[Tensor | None]) -> Tensor | None:
        whole: Tensor | None = None
        for rows, part in zip(rows_of_halves(batch), found, strict=True):
            if part is not None:
                whole = part.new_zeros(len(batch.input_ids), *part.shape[1:]) if whole is None else whole
                whole[rows] = part
        return whole

    return [
        replace(
            batch,
            teacher_logprobs=joined([part.teacher_logprobs for part in parts]),
            teacher_ids=joined([part.teacher_ids for part in parts]),
        )
    ]
