"""Columns of ShareGPT and Alpaca rows as `messages`, or as `prompt` and `completion`."""

from collections.abc import Mapping
from typing import Any

from uniapl.errors import UsageError
from uniapl.untyped import is_list, is_mapping

CHAT_COLUMNS = (
    *("prompt", "completion", "chosen", "rejected", "messages", "conversations"),
    *("tools", "chat_template_kwargs"),
)
"""Columns that may hold chats, or what a chat template gets."""

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("observation", "tool"), "tool"),
}
"""ShareGPT's names in `from` -> role."""


def standard_columns(row: Mapping[str, Any], original: Mapping[str, Any]) -> dict[str, Any]:
    """The row with `messages`, or `prompt` and `completion`, if its form is ShareGPT's or Alpaca's.

    Args:
        row: The columns that have a value, under their names after `data.columns`.
        original: The same columns under their names in the data.

    Raises:
        UsageError: A message has an unknown form, or text of the row would not reach the model.

    Examples:
        >>> standard_columns({"conversations": [{"from": "human", "value": "Hi"}]}, {})["messages"]
        [{'role': 'user', 'content': 'Hi'}]
        >>> standard_columns({"instruction": "Add.", "input": "1 2", "output": "3"}, {})["prompt"]
        'Add.\\n\\n1 2'
    """
    standard = {name: _standard_messages(name, value) for name, value in row.items()}
    if "prompt" in row or "messages" in row:
        is_alpaca = original.get("instruction") is not None and original.get("output") is not None
        if is_alpaca and "instruction" not in row and row.get("input"):
            raise UsageError(
                "the column 'input' of Alpaca's format is not a part of the prompt; remove 'instruction' and "
                "'output' from data.columns, so that the prompt has both, or rename 'input' there"
            )
        return standard
    if "conversations" in row:
        messages = standard["conversations"]
        if is_list(messages) and row.get("system"):
            messages = [{"role": "system", "content": row["system"]}, *messages]
        return standard | {"messages": messages}
    if "instruction" in row and ("input" in row or "output" in row):
        return standard | _from_alpaca(row)
    return standard


def _from_alpaca(row: Mapping[str, Any]) -> dict[str, Any]:
    if row.get("system") or row.get("history"):
        raise UsageError(
            "the columns 'system' and 'history' of Alpaca's format are not read; write the row as 'messages'"
        )
    texts = [row[name] for name in ("instruction", "input") if row.get(name)]
    if not all(isinstance(text, str) for text in texts):
        raise UsageError("'instruction' and 'input' must be text")
    completion = {"completion": row["output"]} if "output" in row else {}
    return {"prompt": "\n\n".join(texts), **completion}


def _standard_messages(name: str, value: Any) -> Any:
    """Messages with `from` and `value` in a chat column as messages with `role` and `content`."""
    if name not in CHAT_COLUMNS or not is_list(value):
        return value
    return [_standard_message(name, message) for message in value]


def _standard_message(name: str, message: Any) -> Any:
    if not is_mapping(message) or not {"from", "value"} <= message.keys():
        return message
    role = ROLES.get(str(message["from"]))
    if role is None:
        raise UsageError(
            f"'{name}': unknown 'from' {message['from']!r:.40}; expected one of {', '.join(ROLES)}, or "
            "messages with 'role' and 'content'"
        )
    rest = {key: item for key, item in message.items() if key not in ("from", "value")}
    return {"role": role, "content": message["value"], **rest}
