"""Tokenise rows into examples."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from uniapl.config import DataConfig
from uniapl.data.conversations import (
    Completion,
    Conversation,
    Message,
    read_conversation,
    template_inputs,
    with_schemas,
)
from uniapl.data.formats import standard_columns
from uniapl.data.rendering import ChatTemplate, Rendered, render_conversation
from uniapl.data.tokenization import EndsEarlyError, encode_completion, encode_prompt, encode_results
from uniapl.errors import UsageError
from uniapl.types import EpisodeStart, Example, Given, Prompt, TokenIds, Tokens
from uniapl.untyped import decode, encode, is_mapping


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The usable rows, and the rows that were left out."""

    examples: tuple[Example, ...]
    left_out: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    """Reason -> row numbers."""
    notes: tuple[str, ...] = ()
    """What the user should know about the rows, each with their numbers."""


def tokenize_rows(
    rows: Iterable[tuple[int, Any]],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    stop_ids: Collection[int] = (),
    context_length: int | None = None,
    max_completion_length: int = 0,
    tools: Sequence[Message] = (),
    episodes: Mapping[int, EpisodeStart] | None = None,
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
        tools: Schemas of the tools that prompts have, unless a row has a column of its own.
        episodes: Row number -> how the row begins in the run's environment; None without an environment.

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
    noted: dict[str, list[int]] = {}
    for number, row in rows:
        try:
            start = (episodes or {}).get(number)
            example = tokenize_row(number, row, tokenizer, config, stop_ids, noted, tools, start)
        except EndsEarlyError as error:
            reason = str(error).removeprefix(f"row {number}: ")
            left_out[reason] = (*left_out.get(reason, ()), number)
            continue
        longest = min(config.max_demonstration_length or math.inf, window - len(example.prompt_ids))
        reason = None
        if len(example.prompt_ids) > longest_prompt:
            reason = f"prompt longer than {longest_prompt} tokens"
        elif any(
            len(turn.completion) > min(config.max_demonstration_length or math.inf, window - len(turn.prompt))
            for turn in example.demonstrated_turns
        ):
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
    notes = (f"{_listed(numbers)}: {note}" for note, numbers in noted.items())
    return Dataset(examples=tuple(examples), left_out=left_out, notes=tuple(notes))


def _listed(numbers: list[int]) -> str:
    others = f" and {len(numbers) - 1} other rows" if len(numbers) > 1 else ""
    return f"row {numbers[0]}{others}"


def unused_columns(rows: Iterable[tuple[int, Any]], config: DataConfig) -> list[str]:
    """Notes on names in `data.columns` that are a column of no row."""
    known = {name for _, row in rows if is_mapping(row) for name in row}
    return [f"data.columns: no row has a column '{name}'" for name in config.columns if name not in known]


def tokenize_row(
    number: int,
    row: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    stop_ids: Collection[int] = (),
    noted: dict[str, list[int]] | None = None,
    tools: Sequence[Message] = (),
    episode: EpisodeStart | None = None,
) -> Example:
    """Tokenise one row, and add its number to its notes in `noted`.

    See :func:`tokenize_rows`, also for the errors.
    """
    notes: set[str] = set()
    try:
        example = _example(number, row, tokenizer, config, stop_ids, notes, tools, episode)
    except UsageError as error:
        raise type(error)(f"row {number}: {error}") from error
    except Exception as error:  # tokenizers raise many types, for example on lone surrogates
        raise UsageError(
            f"row {number}: tokenisation failed: {error!r:.200}; check that its text is valid Unicode"
        ) from error
    for note in sorted(notes):
        (noted if noted is not None else {}).setdefault(note, []).append(number)
    return example


def _example(
    number: int,
    row: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    stop_ids: Collection[int],
    notes: set[str],
    tools: Sequence[Message],
    episode: EpisodeStart | None,
) -> Example:
    original, renamed = _columns(row, config)
    row = standard_columns(renamed, original)
    if episode is not None and episode.observation and not row.keys() & {"prompt", "messages", "chosen"}:
        # As in TRL, where the environment may own the data.
        row = {**row, "prompt": [{"role": "user", "content": ""}]}
    if tools and is_plain_text(row.get("prompt"), config):
        raise UsageError(
            "the prompt is plain text, but rollout.tools and rollout.environment need chat messages; set "
            "data.prompt_format: chat"
        )
    conversation = read_conversation(row, train_on=config.train_on)
    row = with_schemas(row, tools, notes) if tools else row
    if episode is not None and episode.observation:
        conversation = _with_observation(conversation, episode.observation)
    rendered = _rendered(conversation, row, tokenizer, config)
    notes |= rendered.notes
    is_text = is_plain_text(conversation.prompt, config)
    prompt_ids = _prompt_ids(rendered.prompt, tokenizer, is_text=is_text, notes=notes)
    if not prompt_ids:
        raise UsageError("the prompt is empty")
    eos_id: Any = tokenizer.eos_token_id
    stop_ids = {*stop_ids, eos_id}
    demonstration_ids, rejected_ids, earlier = _completion_ids(conversation, rendered, tokenizer, stop_ids)
    demonstration, given = conversation.completion, ()
    if conversation.later:
        assert demonstration_ids is not None
        demonstration_ids, given = _trajectory(demonstration_ids, conversation, rendered, tokenizer, stop_ids)
    if isinstance(demonstration, dict):
        # A tool call is text too: as the completions of the policy are decoded.
        called = "tool_calls" in demonstration
        decoded = decode(demonstration_ids or (), tokenizer, skip_special_tokens=True) if called else ""
        demonstration = decoded or demonstration["content"]
    return Example(
        row=number,
        prompt=conversation.prompt,
        prompt_ids=prompt_ids,
        demonstration=demonstration,
        demonstration_ids=demonstration_ids,
        demonstration_given=given,
        rejected_ids=rejected_ids,
        earlier_turns=earlier,
        # Reward functions get a renamed column under both names.
        columns={
            key: value
            for key, value in {**original, **renamed}.items()
            if key not in ("prompt", "completion", "messages")
        },
        episode=episode,
    )


def _columns(row: Any, config: DataConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row's values without None: under its own names, and under those of `data.columns`."""
    if not is_mapping(row):
        raise UsageError(f"expected a mapping of columns to values, got {row!r:.80}")
    original = {column: value for column, value in row.items() if value is not None}
    return original, _renamed(original, config.columns)


def columns_of_rows(rows: Iterable[tuple[int, Any]], config: DataConfig) -> list[tuple[int, dict[str, Any]]]:
    """Number and columns of each row, renamed ones under both names; None is a missing value.

    Raises:
        UsageError: A row is no mapping, or two columns get the same name.
    """
    found: list[tuple[int, dict[str, Any]]] = []
    for number, row in rows:
        try:
            original, renamed = _columns(row, config)
        except UsageError as error:
            raise UsageError(f"row {number}: {error}") from error
        found.append((number, {**original, **renamed}))
    names = dict.fromkeys(name for _, columns in found for name in columns)
    return [(number, {**dict.fromkeys(names), **columns}) for number, columns in found]


def _with_observation(conversation: Conversation, text: str) -> Conversation:
    """The conversation with the text of an environment's `reset` at the end of its prompt, as in TRL."""
    prompt = conversation.prompt
    if isinstance(prompt, str):
        return replace(conversation, prompt=prompt + text)
    last = prompt[-1]
    if last["role"] != "user":
        raise UsageError(
            "the environment's `reset` returned text, which is appended to the user's last message, but the "
            f"prompt ends with role '{last['role']}'"
        )
    return replace(conversation, prompt=[*prompt[:-1], {**last, "content": last["content"] + text}])


def _completion_ids(
    conversation: Conversation,
    rendered: Rendered,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: set[int],
) -> tuple[TokenIds | None, TokenIds | None, tuple[Tokens, ...]]:
    """Token ids of the demonstration, of the rejected completion, and of the earlier turns."""

    def encoded(text: str, turn: Completion, prompt: str, name: str = "demonstration") -> TokenIds:
        ids = encode_completion(text, tokenizer, stop_ids, prompt=prompt, answer=_answer(turn), name=name)
        if name == "demonstration" and (_is_empty(turn) or stop_ids.issuperset(ids)):
            raise UsageError("the demonstration is empty; add text or remove its column")
        return ids

    demonstration, rejected = rendered.completions
    earlier: list[Tokens] = []
    for index, (prompt, text) in zip(conversation.earlier, rendered.earlier, strict=True):
        turn = conversation.prompt[index]
        assert isinstance(turn, dict)
        prompt_ids = encode(prompt, tokenizer)
        earlier.append(Tokens(prompt_ids, encoded(text, turn, prompt)))
    return (
        None if demonstration is None else encoded(demonstration, conversation.completion, rendered.prompt),
        None
        if rejected is None
        else encoded(rejected, conversation.rejected, rendered.prompt, "rejected completion"),
        tuple(earlier),
    )


def _trajectory(
    first: TokenIds,
    conversation: Conversation,
    rendered: Rendered,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: set[int],
) -> tuple[TokenIds, Given]:
    """Token ids of all turns of the demonstration with the results between them, and the latter's ranges.

    They are built as the sampler builds those of a rollout, turn by turn.

    Args:
        first: Token ids of the first turn.
    """
    ids, given = first, [(0, len(first))] if 0 in conversation.untrained else []
    places = [n for n, message in enumerate(conversation.later, start=1) if message["role"] == "assistant"]
    for place, turn in zip(places, rendered.later, strict=True):
        between = encode_results(turn.results, tokenizer, stop_ids)
        if between[0] in stop_ids:
            # The results' first token ends the turn, in place of the end token that was appended.
            ids, between = (*ids[:-1], between[0]), between[1:]
        answer = _answer(conversation.later[place - 1])
        own = encode_completion(turn.text, tokenizer, stop_ids, prompt=turn.results.answered, answer=answer)
        stop = len(ids) + len(between) + (len(own) if place in conversation.untrained else 0)
        given.append((len(ids), stop))
        ids = (*ids, *between, *own)
    return ids, tuple(given)


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


def _rendered(
    conversation: Conversation, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> Rendered:
    """The texts of the row: verbatim, or as the chat template renders them."""
    prompt, completions = conversation.prompt, (conversation.completion, conversation.rejected)
    if isinstance(prompt, str) and is_plain_text(prompt, config):
        if config.system_prompt is not None:
            raise UsageError(
                "data.system_prompt does not apply to a plain text prompt; remove it or set "
                "data.prompt_format: chat"
            )
        if any(isinstance(completion, dict) and "tool_calls" in completion for completion in completions):
            raise UsageError("a tool call needs a prompt of messages, or data.prompt_format: chat")
        texts = [turn["content"] if isinstance(turn, dict) else turn for turn in completions]
        unused = [name for name in ("tools", "chat_template_kwargs") if name in row]
        notes = {f"{' and '.join(unused)} has no effect on a plain text prompt; set data.prompt_format: chat"}
        return Rendered(prompt=prompt, completions=texts, earlier=[], notes=notes if unused else set())
    messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
    added = int(config.system_prompt is not None and messages[0]["role"] != "system")
    if added:
        messages.insert(0, {"role": "system", "content": config.system_prompt})
    tools, arguments = template_inputs(row)
    return render_conversation(
        messages,
        [_as_message(completion) for completion in completions],
        [index + added for index in conversation.earlier],
        ChatTemplate(
            tokenizer=tokenizer, arguments={**config.chat_template_kwargs, **arguments}, tools=tools or ()
        ),
        later=conversation.later,
    )


def is_plain_text(prompt: Prompt, config: DataConfig) -> bool:
    """Whether a prompt is used verbatim, without the chat template."""
    return isinstance(prompt, str) and config.prompt_format == "text"


def _as_message(completion: Completion) -> Message | None:
    return {"role": "assistant", "content": completion} if isinstance(completion, str) else completion


def _answer(turn: Completion) -> str | None:
    """The text of a completion as in the data; None if the template also writes tool calls."""
    message = _as_message(turn)
    return None if message is None or "tool_calls" in message else str(message["content"])


def _is_empty(completion: Completion) -> bool:
    message = _as_message(completion)
    return message is not None and not message["content"].strip() and "tool_calls" not in message


def _prompt_ids(text: str, tokenizer: PreTrainedTokenizerBase, *, is_text: bool, notes: set[str]) -> TokenIds:
    """Token ids of a prompt; a plain text gets the tokenizer's special tokens, unless it begins with them."""
    if not is_text:
        return encode(text, tokenizer)
    ids, first = encode_prompt(text, tokenizer), encode_prompt("", tokenizer)
    if first and ids[: 2 * len(first)] == first * 2:
        notes.add(
            "the prompt's text begins with the tokenizer's first token (BOS), so no second one is added"
        )
        return ids[len(first) :]
    return ids
