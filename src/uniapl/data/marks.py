"""Marks in the texts of a conversation, by which a text that a chat template loses is found."""

import json
from collections.abc import Iterator
from typing import Any

from uniapl.data.conversations import Message, function_of
from uniapl.untyped import is_list, is_mapping

MARK = "UniAPL{}mark"
"""Appended to every text of a conversation: a text whose mark is not rendered is lost."""
TOOL_MARK, CALL_MARK, DATE_MARK = (MARK.format(text) for text in ("tool", "call", "date"))


def with_marks(index: int, message: Message) -> Message:
    """The message with marks after its content and after the names of functions."""
    message = dict(message)
    if message["content"].strip():
        message["content"] += MARK.format(index)
    if message["role"] == "tool" and isinstance(message.get("name"), str):
        message["name"] += CALL_MARK
    if "tool_calls" in message:
        message["tool_calls"] = [with_marked_name(call, CALL_MARK) for call in message["tool_calls"]]
    return message


def with_marked_name(tool: Message, mark: str) -> Message:
    """A tool or a tool call with a mark after the name of its function."""
    function = {**function_of(tool), "name": function_of(tool)["name"] + mark}
    return {**tool, "function": function} if "function" in tool else function


def leaves(value: Any) -> Iterator[str]:
    """The keys and texts in the arguments of a tool call."""
    if isinstance(value, str):
        yield value
    elif is_mapping(value):
        for key, item in value.items():
            yield str(key)
            yield from leaves(item)
    elif is_list(value):
        for item in value:
            yield from leaves(item)


def occurs(text: str, whole: str) -> bool:
    """Whether the text is in the rendering, as it is or as JSON; templates strip white space around it."""
    return text.strip() in whole or json.dumps(text.strip(), ensure_ascii=False)[1:-1] in whole
