"""Read the columns of a row as a conversation, and decide which of its assistant turns are trained."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from uniapl.errors import UsageError
from uniapl.types import Prompt
from uniapl.untyped import is_dict, is_list, is_mapping, is_sequence

Message = dict[str, Any]
Completion = str | Message | None
"""The completion of a row: text after a plain text prompt, one assistant message, or None."""

TEMPLATE_INPUTS = ("tools", "chat_template_kwargs")
"""Columns that the chat template gets, as in TRL."""
TRAINING_KEYS = ("weight", "train", "training", "loss")
"""Keys of a message that exclude its turn from training (OpenAI, Axolotl, ms-swift); never rendered."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """The prompt and the completions of a row."""

    prompt: Prompt
    completion: Completion
    """The demonstration, or its first turn."""
    rejected: Completion
    earlier: tuple[int, ...] = ()
    """Indices of the prompt's assistant messages that are trained in addition to the completion."""
    later: tuple[Message, ...] = ()
    """What follows the first turn of a trajectory: results of tools, and further turns."""
    untrained: frozenset[int] = frozenset()
    """Of a trajectory, the turns that are not trained: 0 is `completion`, n is `later[n - 1]`."""


def read_conversation(row: Mapping[str, Any], *, train_on: Literal["last", "all"] = "last") -> Conversation:
    """The conversation in a row's columns.

    Args:
        row: Columns to values, without None.
        train_on: `data.train_on`.

    Raises:
        UsageError: The row has no prompt, or its columns contradict each other.
    """
    if "messages" in row:
        if "chosen" in row or "rejected" in row:
            raise UsageError("'chosen' and 'rejected' need 'prompt', not 'messages'")
        messages = checked_messages("'messages'", row["messages"])
        if len(messages) == 1 and messages[0]["role"] == "assistant":
            raise UsageError("'messages' has a completion but no prompt")
        return _with_turns([], messages, None, train_on)
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
    turns = _completion_of(row, column, prompt)
    rejected = _completion_of(row, "rejected", prompt)
    if turns is None and rejected is not None:
        raise UsageError("'rejected' needs 'chosen' or 'completion' in the same row")
    if isinstance(rejected, list):
        rejected = {key: value for key, value in rejected[0].items() if key not in TRAINING_KEYS}
    if isinstance(prompt, str) and (turns is None or isinstance(turns, str)):
        return Conversation(prompt=prompt, completion=turns, rejected=rejected)
    if isinstance(turns, str):
        turns = [{"role": "assistant", "content": turns}]
    if isinstance(prompt, str):
        conversation = _with_turns([{"role": "user", "content": prompt}], turns or [], rejected, train_on)
        if len(conversation.prompt) > 1:
            raise UsageError(f"'{column}' has several messages, so 'prompt' must be a list of messages too")
        return replace(conversation, prompt=prompt)
    return _with_turns(prompt, turns or [], rejected, train_on)


def _completion_of(row: Mapping[str, Any], column: str, prompt: Prompt) -> str | list[Message] | None:
    """Text or messages; the prompt is removed from the beginning of a conversation."""
    value = row.get(column)
    if value is None or isinstance(value, str):
        return value
    messages = checked_messages(f"'{column}'", value)
    if isinstance(prompt, str) and messages[0] == {"role": "user", "content": prompt}:
        # UltraFeedback's form: the prompt as text, and whole conversations as completions.
        messages = messages[1:]
    elif not isinstance(prompt, str) and messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    if not messages or messages[-1]["role"] != "assistant" or (len(messages) > 1 and column != "completion"):
        raise UsageError(
            f"'{column}' must be a string, one assistant message, or a conversation that begins with the "
            "row's prompt"
        )
    return messages


def _with_turns(
    prompt: list[Message], turns: list[Message], rejected: Completion, train_on: str
) -> Conversation:
    """The conversation of `prompt` and `turns`; by default, assistant messages of `turns` are trained."""
    messages = [*prompt, *turns]
    final = len(messages) - 1 if turns and turns[-1]["role"] == "assistant" else len(messages)
    begun = [message["role"] for message in (*prompt[-1:], *turns[:1])] == ["assistant", "assistant"]
    first = final if begun else _first_turn(messages, len(prompt), final)
    answers = sum(message["role"] == "assistant" for message in messages[len(prompt) : first + 1])
    if begun and len(turns) > 1:
        raise UsageError("a prompt that ends with an assistant message can have only one message after it")
    if prompt and answers > 1 and train_on == "last":
        raise UsageError(
            f"'completion' has {answers} assistant messages; set data.train_on: all, or move the earlier "
            "ones to the end of 'prompt'"
        )
    trained: list[int] = []
    for index, message in enumerate(messages):
        wanted = _is_trained(index, message)
        if not (message["role"] == "assistant" and (index >= len(prompt) if wanted is None else wanted)):
            continue
        if index < first and train_on == "last":
            if wanted:
                raise UsageError(
                    f"message {index + 1} is marked to be trained, but data.train_on is 'last'; set it to all"
                )
            continue
        if index == 0:
            raise UsageError("message 1 is an assistant message without a prompt; give it 'weight': 0")
        if messages[index - 1]["role"] == "assistant" and messages[index - 1].get("tool_calls"):
            raise UsageError(
                f"message {index} calls tools, and no result follows it: add a message with the role 'tool' "
                "for each call, or remove the calls"
            )
        if messages[index - 1]["role"] == "assistant" and not (begun and index == len(prompt)):
            raise UsageError(
                f"messages {index} and {index + 1} are both the assistant's; join them into one, or use "
                "'prompt' and 'completion' to continue an answer"
            )
        trained.append(index)
    plain = [{key: value for key, value in m.items() if key not in TRAINING_KEYS} for m in messages]
    demonstrated = any(index >= first for index in trained)
    return Conversation(
        prompt=plain[: first if demonstrated else final],
        completion=plain[first] if demonstrated else None,
        rejected=rejected,
        earlier=tuple(index for index in trained if index < first),
        later=tuple(plain[first + 1 :]) if demonstrated else (),
        untrained=frozenset(
            index - first
            for index in range(first, len(plain))
            if plain[index]["role"] == "assistant" and index not in trained
        ),
    )


def _first_turn(messages: list[Message], begin: int, final: int) -> int:
    """Index of the first assistant message of the trajectory that `final` ends: turns with results of tools
    between them, all of them answers to one message. Without such results it is `final`.

    Args:
        begin: Index of the first message after the row's prompt; the trajectory does not begin before it.
    """
    first = final
    while first - 2 >= begin and messages[first - 1]["role"] == "tool":
        call = first - 1
        while call > begin and messages[call]["role"] == "tool":
            call -= 1
        if messages[call]["role"] != "assistant":
            break
        first = call
    return first if first > 0 else final


def _is_trained(index: int, message: Message) -> bool | None:
    """What the keys of a message say about its training; None if it has no such key."""
    given = {key: message[key] for key in TRAINING_KEYS if key in message}
    if not given:
        return None
    if any(value not in (0, 1) for value in given.values()) or len(set(given.values())) > 1:
        raise UsageError(f"message {index + 1}: {given} must be 0 or 1 (false or true)")
    trained = bool(next(iter(given.values())))
    if trained and message["role"] != "assistant":
        raise UsageError(
            f"message {index + 1} (role '{message['role']}') is marked to be trained; only assistant "
            "messages can be"
        )
    return trained


def checked_messages(name: str, value: Any) -> list[Message]:
    """The chat messages in `value`, with their content as text and without keys whose value is None.

    Raises:
        UsageError: `value` holds no chat messages, or content that is not text; the error begins with `name`.
    """
    messages = [*value] if is_sequence(value) else []
    valid = all(
        is_mapping(m)
        and isinstance(m.get("role"), str)
        and (m.get("content") is not None or m.get("tool_calls"))
        for m in messages
    )
    if not messages or not valid:
        raise UsageError(
            f"{name} must be a string or a list of messages with 'role' and 'content', got {value!r:.80}"
        )
    checked = [_without_none(message) for message in messages]
    for number, message in enumerate(checked, start=1):
        message["content"] = _text(f"{name}, message {number}", message.get("content", ""))
        calls = message.get("tool_calls", [])
        if not is_list(calls) or not all(isinstance(function_of(call).get("name"), str) for call in calls):
            raise UsageError(
                f"{name}, message {number}: 'tool_calls' must be a list of {{'type': 'function', 'function': "
                "{'name': ..., 'arguments': {...}}}"
            )
    return checked


def _text(name: str, content: Any) -> str:
    """Message content as text; the parts of a list are joined."""
    parts = [content] if isinstance(content, str) else content
    if not is_sequence(parts):
        raise UsageError(f"{name}: the content must be text or a list of text parts, got {content!r:.80}")
    texts: list[str] = []
    for part in parts:
        text = part.get("text") if is_mapping(part) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type", part) if is_mapping(part) else part
            if kind == "text":
                raise UsageError(f"{name}: a part of type 'text' has no 'text': {part!r:.60}")
            raise UsageError(f"{name}: content of type {kind!r:.40} is not supported, only text; remove it")
        texts.append(text)
    return "".join(texts)


def _without_none(value: Any) -> Any:
    """A copy without keys whose value is None, with which Parquet fills what other rows have."""
    if is_mapping(value):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if is_sequence(value) else value


def function_of(tool: Any) -> Mapping[str, Any]:
    """The function of a tool or of a tool call: under 'function', or the mapping itself."""
    function = tool.get("function", tool) if is_mapping(tool) else None
    return function if is_mapping(function) else {}


def arguments_of(call: Message) -> Any:
    """The arguments of a tool call as a mapping; OpenAI's format has them as JSON text."""
    arguments = function_of(call).get("arguments", {})
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError as error:
        raise UsageError(f"the arguments of a tool call are not JSON: {arguments!r:.60}") from error


def template_inputs(row: Mapping[str, Any]) -> tuple[list[Message] | None, dict[str, Any]]:
    """The columns :data:`TEMPLATE_INPUTS`.

    Both may be JSON text, because a table has one type per column.

    Raises:
        UsageError: A column has another form.
    """
    values = {name: row.get(name) for name in TEMPLATE_INPUTS}
    for name, value in values.items():
        try:
            values[name] = json.loads(value) if isinstance(value, str) and value.strip() else value or None
        except (ValueError, RecursionError) as error:
            raise UsageError(f"'{name}' is text but not JSON ({error})") from error
    tools, arguments = (_without_none(value) for value in values.values())
    if tools is not None and not (
        is_list(tools) and all(isinstance(function_of(tool).get("name"), str) for tool in tools)
    ):
        raise UsageError(f"'tools' must be a list of JSON schemas of functions, got {tools!r:.80}")
    if arguments is not None and not is_dict(arguments):
        raise UsageError(f"'chat_template_kwargs' must map names to values, got {arguments!r:.80}")
    return tools, arguments or {}


def with_schemas(row: Mapping[str, Any], tools: Sequence[Message], notes: set[str]) -> dict[str, Any]:
    """The row with the schemas of the run's tools unless it has its own; notes say what rollouts ignore."""
    own, arguments = template_inputs(row)
    shown, known = ({str(function_of(tool)["name"]) for tool in part} for part in (own or (), tools))
    if "tools" in row and shown != known:
        notes.add(
            f"the prompt shows the functions of the column 'tools' ({', '.join(sorted(shown)) or 'none'}), "
            "but rollouts can call those of rollout.tools and rollout.environment"
        )
    called = {
        str(function_of(call).get("name"))
        for message in (*_mappings(row.get("messages")), *_mappings(row.get("completion")))
        for call in _mappings(message.get("tool_calls"))
    }
    if missing := called - known:
        notes.add(
            f"demonstrations call {', '.join(sorted(missing))}, which the policy cannot: rollout.tools and "
            f"rollout.environment have {', '.join(sorted(known))}"
        )
    if arguments:
        notes.add("the column 'chat_template_kwargs' does not apply to results of tools in rollouts")
    return {"tools": [*tools], **row}


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if is_mapping(item)] if is_list(value) else []
