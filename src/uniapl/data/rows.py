"""Tokenise rows into examples."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from uniapl.config import DataConfig
from uniapl.data.conversations import completion_of, plain_text, prompt_and_completion, render_chat
from uniapl.data.formats import standard_columns
from uniapl.data.tokenization import EndsEarlyError, encode_completion, encode_prompt
from uniapl.errors import UsageError
from uniapl.types import Example


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The usable rows, and the rows that were left out."""

    examples: tuple[Example, ...]
    left_out: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Reason -> row numbers."""


def tokenize_rows(
    rows: Iterable[tuple[int, Any]],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    stop_ids: Collection[int] = (),
    context_length: int | None = None,
    max_completion_length: int = 0,
) -> Dataset:
    """Check the columns of rows, tokenise them, and leave out rows that cannot be used whole.

    These are rows that are too long, and rows with an end token inside a completion.

    Args:
        rows: (number, row) pairs; error messages contain the number.
        tokenizer: The policy's tokenizer, whose chat template is used for chat prompts.
        config: The `data` section.
        stop_ids: Tokens at which the sampler stops, in addition to the tokenizer's end token. Demonstrations
            end at them too.
        context_length: The model's context length in tokens; longer rows are left out.
        max_completion_length: Tokens to reserve after the prompt for a rollout.

    Raises:
        UsageError: A row is invalid or has an empty demonstration, the tokenizer has no end token or no chat
            template, or no row is usable.
    """
    if tokenizer.eos_token_id is None:
        raise UsageError("the tokenizer has no end token (eos_token), so the policy could not learn to stop")
    window = context_length or math.inf
    longest_prompt = min(config.max_prompt_length or math.inf, window - max_completion_length)
    if longest_prompt < 1:
        raise UsageError(
            f"rollout.max_completion_length {max_completion_length} leaves no room for a prompt in the "
            f"model's context of {context_length} tokens; lower it"
        )
    examples: list[Example] = []
    left_out: dict[str, tuple[int, ...]] = {}
    for number, row in rows:
        try:
            example = tokenize_row(number, row, tokenizer, config, stop_ids)
        except EndsEarlyError as error:
            reason = str(error).removeprefix(f"row {number}: ")
            left_out[reason] = (*left_out.get(reason, ()), number)
            continue
        longest = min(config.max_demonstration_length or math.inf, window - len(example.prompt_ids))
        reason = None
        if len(example.prompt_ids) > longest_prompt:
            reason = f"prompt longer than {longest_prompt} tokens"
        elif len(example.demonstration_ids or ()) > longest:
            reason = "demonstration too long"
        elif len(example.rejected_ids or ()) > longest:
            reason = "rejected completion too long"
        if reason is None:
            examples.append(example)
        else:
            left_out[reason] = (*left_out.get(reason, ()), number)
    if not examples:
        reasons = "; ".join(f"{reason}: {len(numbers)} rows" for reason, numbers in left_out.items())
        raise UsageError(f"no usable row: {reasons or 'the data is empty'}")
    return Dataset(examples=tuple(examples), left_out=left_out)


def unused_columns(rows: Iterable[tuple[int, Any]], config: DataConfig) -> list[str]:
    """Notes on names in `data.columns` that are a column of no row."""
    known = {name for _, row in rows if isinstance(row, Mapping) for name in row}
    return [f"data.columns: no row has a column '{name}'" for name in config.columns if name not in known]


def tokenize_row(
    number: int,
    row: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    stop_ids: Collection[int] = (),
) -> Example:
    """Tokenise one row. See :func:`tokenize_rows`, also for the errors."""
    try:
        return _example(number, row, tokenizer, config, stop_ids)
    except UsageError as error:
        raise type(error)(f"row {number}: {error}") from error
    except Exception as error:  # tokenizers raise many types, for example on lone surrogates
        raise UsageError(
            f"row {number}: tokenisation failed: {error!r:.200}; check that its text is valid Unicode"
        ) from error


def _example(
    number: int,
    row: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    stop_ids: Collection[int],
) -> Example:
    if not isinstance(row, Mapping):
        raise UsageError(f"expected a mapping of columns to values, got {row!r:.80}")
    original = {column: value for column, value in row.items() if value is not None}
    renamed = _renamed(original, config.columns)
    row = standard_columns(renamed, original)
    prompt, completion = prompt_and_completion(row)
    rejected = completion_of(row, "rejected", prompt)
    plain = plain_text(completion)
    if isinstance(prompt, str) and config.prompt_format == "text":
        if config.system_prompt is not None:
            raise UsageError(
                "data.system_prompt does not apply to a plain text prompt; remove it or set "
                "data.prompt_format: chat"
            )
        text, demonstration, rejected_text = prompt, plain, plain_text(rejected)
        prompt_ids = encode_prompt(prompt, tokenizer)
    else:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if config.system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": config.system_prompt})
        text, (demonstration, rejected_text) = render_chat(
            messages, [completion, rejected], tokenizer, config.chat_template_kwargs
        )
        prompt_ids = tuple(tokenizer(text, add_special_tokens=False).input_ids)
    if not prompt_ids:
        raise UsageError("the prompt is empty")
    eos_id: Any = tokenizer.eos_token_id
    stop_ids = {*stop_ids, eos_id}
    demonstration_ids, rejected_ids = (
        None
        if completed is None
        else encode_completion(completed, tokenizer, stop_ids, prompt=text, answer=answer, name=name)
        for completed, answer, name in (
            (demonstration, plain, "demonstration"),
            (rejected_text, plain_text(rejected), "rejected completion"),
        )
    )
    if demonstration_ids is None and rejected_ids is not None:
        raise UsageError("'rejected' needs 'chosen' or 'completion' in the same row")
    if plain is not None and (not plain.strip() or stop_ids.issuperset(demonstration_ids or ())):
        raise UsageError("the demonstration is empty; add text or remove its column")
    return Example(
        row=number,
        prompt=prompt,
        prompt_ids=prompt_ids,
        demonstration=plain,
        demonstration_ids=demonstration_ids,
        rejected_ids=rejected_ids,
        # Reward functions get a renamed column under both names.
        columns={
            key: value
            for key, value in {**original, **renamed}.items()
            if key not in ("prompt", "completion", "messages")
        },
    )


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with the column names of `data.columns`."""
    names: dict[str, str] = {}
    for column in row:
        new = columns.get(column, column)
        if new in names:
            old, other = (column, names[new]) if column in columns else (names[new], column)
            also = "which is also a column" if other == new else f"and '{other}' too"
            raise UsageError(f"data.columns renames '{old}' to '{new}', {also}; rename one to another name")
        names[new] = column
    return {new: row[column] for new, column in names.items()}
