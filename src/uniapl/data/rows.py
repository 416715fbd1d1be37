"""Read rows from a file or the Hub and tokenise them into examples."""

import contextlib
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from uniapl.config import DataConfig
from uniapl.errors import UsageError
from uniapl.types import Example, Prompt, TokenIds

TEXT_COLUMNS = ("prompt", "completion", "chosen", "rejected")
FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
Message = dict[str, Any]
Completion = str | list[Message] | None
"""The completion of a row: text, one assistant message, or None."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The usable rows, and the rows that were left out."""

    examples: tuple[Example, ...]
    left_out: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Reason -> row numbers."""


@contextlib.contextmanager
def named_source(source: str | None) -> Iterator[None]:
    """Prefix errors about rows with the source of the rows; None leaves them unchanged (rows from Python)."""
    try:
        yield
    except UsageError as error:
        if source is None or not str(error).startswith(("row ", "no usable row")):
            raise
        raise UsageError(f"{source}: {error}") from error


def read_rows(config: DataConfig) -> list[tuple[int, Any]]:
    """Read `config.path` into (number, row) pairs, numbered from 1; in a .jsonl file by line.

    JSON is not read with `datasets`: its columns have one type, but a file may mix plain and chat prompts,
    and an error can name the line.

    Raises:
        UsageError: The file or Hub data set does not exist, is invalid, or has no rows.
    """
    if config.path is None:
        raise UsageError("no data: set data.path to a .jsonl, .json, .csv or .parquet file or a Hub id")
    path = Path(config.path)
    # os.path.isfile also accepts names that are too long for a file, unlike Path.is_file.
    exists = os.path.isfile(path)
    if exists and path.suffix not in FILE_TYPES:
        raise UsageError(f"data.path: '{path}' must end in .jsonl, .json, .csv or .parquet")
    if not exists and path.suffix in FILE_TYPES:
        raise UsageError(f"data.path: file not found: '{path}'")
    try:
        if path.suffix == ".jsonl":
            rows = _read_jsonl(path)
        elif path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8-sig"))
            if not isinstance(content, list):
                raise UsageError(f"{path}: expected a list of rows; use .jsonl for one row per line")
            rows = list(enumerate(content, start=1))
        else:
            rows = list(enumerate(_load_dataset(config, path), start=1))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: invalid UTF-8 ({error}); convert it, e.g. with iconv") from error
    except OSError as error:
        raise UsageError(f"data.path: cannot read '{path}': {error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: invalid JSON ({error})") from error
    if not rows:
        raise UsageError(f"{path}: the file has no rows")
    return rows


def _read_jsonl(path: Path) -> list[tuple[int, Any]]:
    rows: list[tuple[int, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        try:
            if line.strip():
                rows.append((number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            raise UsageError(f"{path}: line {number}: invalid JSON ({reason})") from error
    return rows


def _load_dataset(config: DataConfig, path: Path) -> Iterable[Mapping[str, Any]]:
    import datasets

    load: Any = datasets.load_dataset
    try:
        if path.suffix == ".csv":
            # Text columns stay text, also 11 and "None"; only an empty cell is missing.
            texts = [*TEXT_COLUMNS, *(name for name, new in config.columns.items() if new in TEXT_COLUMNS)]
            converters = dict.fromkeys(texts, lambda text: text or None)
            options = {"keep_default_na": False, "na_values": [""], "converters": converters}
            return load("csv", data_files=str(path), split="train", **options)
        if path.suffix == ".parquet":
            return load("parquet", data_files=str(path), split="train")
        return load(config.path, split=config.split)
    except Exception as error:  # the readers and the Hub client raise many types
        # The message of `datasets` does not contain the reason, which is in the cause.
        raise UsageError(f"data.path: cannot load '{config.path}': {error.__cause__ or error}") from error


def tokenize_rows(
    rows: Iterable[tuple[int, Any]],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    stop_ids: Collection[int] = (),
    context_length: int | None = None,
    max_completion_length: int = 0,
) -> Dataset:
    """Check the columns of rows, tokenise prompts and completions, and leave out rows that are too long.

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
        example = tokenize_row(number, row, tokenizer, config, stop_ids)
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
        raise UsageError(f"row {number}: {error}") from error
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
    for name, new in config.columns.items():
        if row.get(name) is not None and row.get(new) is not None:
            raise UsageError(f"data.columns renames '{name}' to '{new}', which is also a column")
    row = {config.columns.get(column, column): value for column, value in row.items() if value is not None}
    prompt, completion = _prompt_and_completion(row)
    rejected = _completion(row, "rejected", prompt)
    plain = _plain_text(completion)
    if isinstance(prompt, str) and config.prompt_format == "text":
        if config.system_prompt is not None:
            raise UsageError(
                "data.system_prompt does not apply to a plain text prompt; remove it or set "
                "data.prompt_format: chat"
            )
        demonstration, rejected_text = plain, _plain_text(rejected)
        prompt_ids = _encode_prompt(prompt, tokenizer)
    else:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if config.system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": config.system_prompt})
        text, (demonstration, rejected_text) = _render_chat(
            messages, [completion, rejected], tokenizer, config.chat_template_kwargs
        )
        prompt_ids = tuple(tokenizer(text, add_special_tokens=False).input_ids)
    if not prompt_ids:
        raise UsageError("the prompt is empty")
    eos_id: Any = tokenizer.eos_token_id
    stop_ids = {*stop_ids, eos_id}
    demonstration_ids, rejected_ids = (
        None if text is None else _encode_completion(text, tokenizer, stop_ids)
        for text in (demonstration, rejected_text)
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
        columns={key: value for key, value in row.items() if key not in ("prompt", "completion", "messages")},
    )


def _prompt_and_completion(row: Mapping[str, Any]) -> tuple[Prompt, Completion]:
    if "messages" in row:
        if "chosen" in row or "rejected" in row:
            raise UsageError("'chosen' and 'rejected' need 'prompt', not 'messages'")
        messages = checked_messages("'messages'", row["messages"])
        if messages[-1]["role"] != "assistant":
            return messages, None
        if len(messages) == 1:
            raise UsageError("'messages' has a completion but no prompt")
        return messages[:-1], messages[-1:]
    if "completion" in row and "chosen" in row:
        raise UsageError("both 'completion' and 'chosen' could be the demonstration; remove one")
    column = "chosen" if "chosen" in row else "completion"
    prompt = row.get("prompt")
    if prompt is None and column == "chosen" and not isinstance(row["chosen"], str):
        # TRL's implicit prompt: 'chosen' and 'rejected' are complete conversations.
        prompt = checked_messages("'chosen'", row["chosen"])[:-1] or None
    if prompt is None:
        known = ", ".join(sorted(str(column) for column in row)) or "none"
        raise UsageError(
            f"no 'prompt' and no 'messages' (columns: {known:.200}); rename a column with data.columns, e.g. "
            "{question: prompt}"
        )
    if not isinstance(prompt, str):
        prompt = checked_messages("'prompt'", prompt)
    return prompt, _completion(row, column, prompt)


def _completion(row: Mapping[str, Any], column: str, prompt: Prompt) -> Completion:
    """Text or one assistant message; the prompt is removed from the beginning of a conversation."""
    value = row.get(column)
    if value is None or isinstance(value, str):
        return value
    messages = checked_messages(f"'{column}'", value)
    if not isinstance(prompt, str) and messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise UsageError(
            f"'{column}' must be a string, one assistant message, or a conversation that begins with the "
            "row's prompt"
        )
    return messages


def checked_messages(name: str, value: Any) -> list[Message]:
    """The chat messages in `value`, without keys whose value is None.

    Raises:
        UsageError: `value` holds no chat messages; the error begins with `name`.
    """
    messages = list(value) if isinstance(value, (list, tuple)) else []
    valid = all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and m.get("content") is not None
        for m in messages
    )
    if not messages or not valid:
        raise UsageError(
            f"{name} must be a string or a list of messages with 'role' and 'content', got {value!r:.80}"
        )
    return [{key: item for key, item in message.items() if item is not None} for message in messages]


def _render_chat(
    messages: list[Message],
    completions: Sequence[Completion],
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any],
) -> tuple[str, list[str | None]]:
    """The prompt's text with the generation prompt, and the text that each completion adds to it."""
    if tokenizer.chat_template is None:
        raise UsageError(
            "a chat needs a chat template, but the tokenizer has none; use a chat model's tokenizer, or "
            "strings as prompts with data.prompt_format: text (the default)"
        )

    def render(turns: list[Message], **options: Any) -> str:
        template: Any = tokenizer.apply_chat_template
        try:
            return str(template(turns, tokenize=False, **options, **chat_template_kwargs))
        except Exception as error:  # templates raise types of their authors' choice
            raise UsageError(f"the chat template raised an error: {error}") from error

    prompt = render(messages, add_generation_prompt=True)
    texts: list[str | None] = []
    for completion in completions:
        turn = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        text = None if turn is None else render(messages + turn, add_generation_prompt=False)
        if text is not None and not text.startswith(prompt):
            raise UsageError(
                "the chat template renders the prompt differently when a completion follows, so the "
                "completion's tokens are unknown; change data.chat_template_kwargs (e.g. enable_thinking)"
            )
        texts.append(text and text[len(prompt) :])
    return prompt, texts


def _plain_text(completion: Completion) -> str | None:
    if completion is None or isinstance(completion, str):
        return completion
    content = completion[0]["content"]
    if not isinstance(content, str):
        raise UsageError(f"the content of the demonstration must be text, got {content!r:.80}")
    return content


def _encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> TokenIds:
    ids = tuple(tokenizer(text).input_ids)
    # Some tokenizers append EOS to every text, but a prompt that has ended cannot be continued.
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _encode_completion(text: str, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> TokenIds:
    """Token ids up to and including the first stop token; the end token is appended if there is none.

    Text that a chat template writes after the stop token, often a newline, is removed: the sampler cannot
    generate it, so the discriminator would recognise demonstrations by it.
    """
    ids = tuple(tokenizer(text, add_special_tokens=False).input_ids)
    end = next((index for index, token in enumerate(ids) if token in stop_ids), None)
    eos_id: Any = tokenizer.eos_token_id
    return (*ids, eos_id) if end is None else ids[: end + 1]
