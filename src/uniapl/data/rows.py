"""Rows of a file or a data set -> tokenised examples."""

import contextlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from uniapl.config import DataConfig
from uniapl.errors import UsageError
from uniapl.types import Example, Prompt, TokenIds

TEXTS = ("prompt", "completion", "chosen", "rejected")
Row = Mapping[str, Any]
Answer = str | list[dict[str, Any]] | None
"""As the data has it: text, one assistant message, or nothing."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """All usable rows, and which were left out and why."""

    examples: tuple[Example, ...]
    left_out: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Reason -> row numbers."""


@contextlib.contextmanager
def named_source(source: str | None) -> Iterator[None]:
    """Let errors about a row also say where it stands; None: the rows came from Python.

    Raises:
        UsageError: As inside, with the source before it.
    """
    try:
        yield
    except UsageError as error:
        if source is None or not str(error).startswith(("row ", "no usable row")):
            raise
        raise UsageError(f"{source}: {error}") from error


def read_rows(config: DataConfig) -> list[tuple[int, Any]]:
    """What stands in `config.path`, with its rows' numbers, counted from 1 (the line's in a .jsonl file).

    JSON is read line by line rather than through `datasets`, whose columns must have one type: a file may mix
    plain and chat prompts, and an error can name its line.

    Raises:
        UsageError: No such file, not readable as what it claims to be, or no rows.
    """
    if config.path is None:
        raise UsageError("no data: set data.path to a .jsonl, .json, .csv or .parquet file or a Hub id")
    path = Path(config.path)
    looks_local = path.suffix in (".jsonl", ".json", ".csv", ".parquet")
    # os.path, unlike pathlib, says of every name whether it is a file: too long ones too.
    if os.path.isfile(path) and not looks_local:
        raise UsageError(f"data.path: '{path}' must end in .jsonl, .json, .csv or .parquet")
    if looks_local and not os.path.isfile(path):
        raise UsageError(f"data.path: there is no file '{path}'")
    try:
        if path.suffix == ".jsonl":
            rows = _read_jsonl(path)
        elif path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8-sig"))
            if not isinstance(content, list):
                raise UsageError(
                    f"{path}: must hold a list of rows; one row per line belongs in a .jsonl file"
                )
            rows = list(enumerate(content, start=1))
        else:
            rows = list(enumerate(_load_dataset(config, path), start=1))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error}); convert it, e.g. with iconv") from error
    except OSError as error:
        raise UsageError(f"data.path: '{path}' cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid JSON ({error})") from error
    if not rows:
        raise UsageError(f"{path}: holds no rows")
    return rows


def _read_jsonl(path: Path) -> list[tuple[int, Any]]:
    rows: list[tuple[int, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            said = getattr(error, "msg", error)
            raise UsageError(f"{path}: line {number} is not valid JSON ({said})") from error
    return rows


def _load_dataset(config: DataConfig, path: Path) -> Iterable[Row]:
    import datasets

    load: Any = datasets.load_dataset
    try:
        if path.suffix == ".csv":
            # Only an empty cell is missing: "None" and "NA" may well be answers.
            form: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
            # Text stays text: an answer may well be 11.
            texts = [*TEXTS, *(theirs for theirs, ours in config.columns.items() if ours in TEXTS)]
            form["converters"] = dict.fromkeys(texts, lambda text: text or None)
            return load("csv", data_files=str(path), split="train", **form)
        if path.suffix == ".parquet":
            return load("parquet", data_files=str(path), split="train")
        return load(config.path, split=config.split)
    except Exception as error:  # of the reader or the Hub client; the user must hear which source
        # `datasets` says only that something went wrong; what did is its cause.
        raise UsageError(f"data.path '{config.path}' cannot be loaded: {error.__cause__ or error}") from error


def tokenize_rows(
    rows: Iterable[tuple[int, Any]],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    stop_ids: Collection[int] = (),
    context_length: int | None = None,
    max_completion_length: int = 0,
) -> Dataset:
    """Rows -> examples: columns checked, prompts and demonstrations tokenised, over-long ones left out.

    Args:
        rows: (number, row) pairs; the number is what errors name.
        tokenizer: The policy's; its chat template is used for chat prompts.
        config: The `data` section.
        stop_ids: Tokens at which the sampler ends an answer, so that demonstrations end in the same way; the
            tokenizer's end token is always one.
        context_length: The model's window; longer rows are left out.
        max_completion_length: Room that a rollout needs behind the prompt.

    Raises:
        UsageError: A row of a wrong form, a demonstration that would supervise nothing, a tokenizer without
            end token or chat template, or no usable row at all.
    """
    if tokenizer.eos_token_id is None:
        raise UsageError("the tokenizer has no end token (eos_token): the model could never learn to stop")
    longest_prompt = min(config.max_prompt_length or 2**62, (context_length or 2**62) - max_completion_length)
    if longest_prompt < 1:
        window = f"no prompt fits beside it in the model's window of {context_length} tokens"
        raise UsageError(f"max_completion_length {max_completion_length}: {window}; lower it")
    longest_demonstration = config.max_demonstration_length or 2**62
    examples: list[Example] = []
    left_out: dict[str, list[int]] = {}
    for number, row in rows:
        try:
            example = tokenize_row(number, row, tokenizer, config, stop_ids)
        except UsageError:
            raise
        except Exception as error:  # tokenizers raise what they like, e.g. on lone surrogates
            raise UsageError(
                f"row {number} cannot be tokenised: {error!r:.200}; is its text valid Unicode?"
            ) from error
        if len(example.prompt_ids) > longest_prompt:
            left_out.setdefault(f"prompt longer than {longest_prompt} tokens", []).append(number)
            continue
        answers = {"demonstration": example.demonstration_ids, "rejected answer": example.rejected_ids}
        room = min(longest_demonstration, (context_length or 2**62) - len(example.prompt_ids))
        too_long = [name for name, ids in answers.items() if len(ids or ()) > room]
        if too_long:
            left_out.setdefault(f"{too_long[0]} too long", []).append(number)
            continue
        examples.append(example)
    if not examples:
        reasons = "; ".join(f"{reason}: {len(numbers)} rows" for reason, numbers in left_out.items())
        raise UsageError(f"no usable row: {reasons or 'the data is empty'}")
    return Dataset(
        examples=tuple(examples), left_out={reason: tuple(numbers) for reason, numbers in left_out.items()}
    )


def tokenize_row(
    number: int,
    row: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    stop_ids: Collection[int] = (),
) -> Example:
    """One row -> one example. See :func:`tokenize_rows` for what is refused."""
    if not isinstance(row, Mapping):
        raise UsageError(f"row {number} is not a mapping of columns to values: {row!r:.80}")
    for theirs, name in config.columns.items():
        if row.get(theirs) is not None and row.get(name) is not None:
            raise UsageError(
                f"row {number}: data.columns renames '{theirs}' to '{name}', which is there already"
            )
    row = {config.columns.get(column, column): value for column, value in row.items() if value is not None}
    prompt, completion = _prompt_and_completion(number, row)
    rejected = _answer(number, row, "rejected", prompt)
    plain = _plain(number, completion)
    columns = {key: value for key, value in row.items() if key not in ("prompt", "completion", "messages")}
    if isinstance(prompt, str) and config.prompt_format == "text":
        if config.system_prompt is not None:
            raise UsageError(
                f"row {number} is plain text, which has no place for data.system_prompt; "
                "set data.prompt_format: chat, or leave the system prompt out"
            )
        demonstration, disliked = plain, _plain(number, rejected)
        prompt_ids = _encode_prompt(prompt, tokenizer)
    else:
        messages = _as_messages(prompt, config.system_prompt)
        prompt_text, demonstration = _render_chat(number, messages, completion, tokenizer, config)
        _, disliked = _render_chat(number, messages, rejected, tokenizer, config)
        prompt_ids = tuple(tokenizer(prompt_text, add_special_tokens=False).input_ids)
    if not prompt_ids:
        raise UsageError(f"row {number}: the prompt is empty")
    demonstration_ids: TokenIds | None = None
    assert isinstance(tokenizer.eos_token_id, int)
    stop_ids = {*stop_ids, tokenizer.eos_token_id}
    if demonstration is not None:
        demonstration_ids = _encode_completion(demonstration, tokenizer, stop_ids)
        if not (plain or "").strip() or all(token in stop_ids for token in demonstration_ids):
            raise UsageError(f"row {number}: the demonstration is empty, no token could be learnt from it")
    elif disliked is not None:
        raise UsageError(f"row {number} has 'rejected' but no 'chosen' and no 'completion' to prefer to it")
    return Example(
        row=number,
        prompt=prompt,
        prompt_ids=prompt_ids,
        demonstration=plain,
        demonstration_ids=demonstration_ids,
        rejected_ids=None if disliked is None else _encode_completion(disliked, tokenizer, stop_ids),
        columns=columns,
    )


def _prompt_and_completion(number: int, row: Row) -> tuple[Prompt, Answer]:
    if row.get("messages") is not None and (row.get("chosen") is not None or row.get("rejected") is not None):
        raise UsageError(
            f"row {number}: preferences need 'prompt' beside 'chosen' and 'rejected', not 'messages'"
        )
    if row.get("messages") is not None:
        messages = checked_messages(number, "messages", row["messages"])
        if messages[-1]["role"] == "assistant":
            if len(messages) == 1:
                raise UsageError(f"row {number}: 'messages' holds an answer but no prompt")
            return messages[:-1], messages[-1:]
        return messages, None
    prompt = row.get("prompt")
    if row.get("completion") is not None and row.get("chosen") is not None:
        raise UsageError(f"row {number} has both 'completion' and 'chosen': which one is the demonstration?")
    column = "completion" if row.get("chosen") is None else "chosen"
    if prompt is None and column == "chosen" and not isinstance(row["chosen"], str):
        # TRL's implicit prompt: both answers are whole conversations.
        conversation = checked_messages(number, "chosen", row["chosen"])
        prompt = conversation[:-1] or None
    if prompt is None:
        known = ", ".join(sorted(str(column) for column in row)) or "none"
        raise UsageError(
            f"row {number} has no 'prompt' and no 'messages' (its columns: {known:.200}); "
            "name yours with data.columns, e.g. {question: prompt}"
        )
    if not isinstance(prompt, str):
        prompt = checked_messages(number, "prompt", prompt)
    return prompt, _answer(number, row, column, prompt)


def _answer(number: int, row: Row, column: str, prompt: Prompt) -> Answer:
    """A string, or one assistant message; a conversation that begins with the prompt is cut to its answer."""
    value = row.get(column)
    if value is None or isinstance(value, str):
        return value
    messages = checked_messages(number, column, value)
    if not isinstance(prompt, str) and messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise UsageError(
            f"row {number}: '{column}' must be a string, one assistant message, or a conversation that "
            "begins with the row's prompt"
        )
    return messages


def checked_messages(number: int, column: str, value: Any) -> list[dict[str, Any]]:
    """The messages of a chat, if that is what a column holds.

    Raises:
        UsageError: It is something else, naming the row.
    """
    messages = list(value) if isinstance(value, (list, tuple)) else []
    whole = all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and m.get("content") is not None
        for m in messages
    )
    if not messages or not whole:
        raise UsageError(
            f"row {number}: '{column}' must be a string or a list of messages with 'role' and 'content', "
            f"got {value!r:.80}"
        )
    return [{key: item for key, item in message.items() if item is not None} for message in messages]


def _as_messages(prompt: Prompt, system_prompt: str | None) -> list[dict[str, Any]]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def _render_chat(
    number: int,
    messages: list[dict[str, Any]],
    completion: Answer,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
) -> tuple[str, str | None]:
    """The prompt's text with the generation prompt, and what the template writes behind it for the answer."""
    if tokenizer.chat_template is None:
        raise UsageError(
            f"row {number} is a chat, but the tokenizer has no chat template; use a chat model's tokenizer "
            "or give plain strings as prompts (with data.prompt_format: text, the default)"
        )

    def render(turns: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        template: Any = tokenizer.apply_chat_template
        try:
            text = template(
                turns,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **config.chat_template_kwargs,
            )
        except Exception as error:  # templates raise what their authors chose
            raise UsageError(f"row {number}: the chat template refuses it: {error}") from error
        return str(text)

    prompt_text = render(messages, add_generation_prompt=True)
    if completion is None:
        return prompt_text, None
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    whole = render(messages + answer, add_generation_prompt=False)
    if not whole.startswith(prompt_text):
        raise UsageError(
            f"row {number}: the chat template writes the prompt differently once an answer follows, so the "
            "answer's tokens cannot be told apart; change data.chat_template_kwargs (e.g. enable_thinking)"
        )
    return prompt_text, whole[len(prompt_text) :]


def _plain(number: int, completion: Answer) -> str | None:
    if completion is None or isinstance(completion, str):
        return completion
    content = completion[0]["content"]
    if not isinstance(content, str):
        raise UsageError(f"row {number}: the demonstration's content must be text, got {content!r:.80}")
    return content


def _encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> TokenIds:
    ids = tuple(tokenizer(text).input_ids)
    # Some tokenizers end every text with EOS; a prompt that has ended cannot be continued.
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _encode_completion(text: str, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> TokenIds:
    """Ids up to and including the first token that ends an answer; the end token is appended where none does.

    What a chat template writes behind it (often a newline) is cut: no sampler would produce it, and a
    discriminator would know the expert by it.
    """
    ids = tuple(tokenizer(text, add_special_tokens=False).input_ids)
    end = next((index for index, token in enumerate(ids) if token in stop_ids), None)
    if end is not None:
        return ids[: end + 1]
    assert isinstance(tokenizer.eos_token_id, int)
    return (*ids, tokenizer.eos_token_id)
