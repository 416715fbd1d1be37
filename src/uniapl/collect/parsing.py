"""Read the endpoint's responses: the text of a completion, and errors that concern the account."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

TEXT_PARTS = ("text", "output_text")
THINKING_PARTS = ("thinking", "redacted_thinking", "reasoning")
ABORTED = ("abort", "error")
"""Finish reasons of a completion that the server could not finish."""
REFUSED_ACCOUNT = (401, 402, 403)
EXHAUSTED = re.compile(
    r"insufficient[ _-]?(quota|balance|credit|fund)|exceeded_current_quota|billing_|credit[ _](balance|limit)"
    r"|payment_required|arrearage",
    re.IGNORECASE,
)
"""Codes of an account without quota or credit. Limits per minute also use the word "quota"."""


class UnreadableContentError(Exception):
    """The content of a completion is in a form that another request would repeat."""


def parse_reply(found: Any) -> dict[str, Any]:
    """The fields of a :class:`~uniapl.collect.cache.Reply` but its URL.

    Raises:
        UnreadableContentError: The content has parts that are not text.
        Exception: The response is malformed, which another try may not be.
    """
    choice = found["choices"][0]
    finish_reason = choice.get("finish_reason")
    # A blocked completion may have a finish reason and no message.
    message = choice["message"] if finish_reason is None else choice.get("message") or {}
    usage, model = found.get("usage") or {}, found.get("model")
    if str(finish_reason).lower() in ABORTED:
        raise ValueError(f"the server aborted the completion: finish_reason '{finish_reason}'")
    content, thinking = _texts(message.get("content"))
    reasoning, _ = _texts(message.get("reasoning_content") or message.get("reasoning"))
    # Some servers report "stop" for both.
    if message.get("refusal"):
        finish_reason = "refusal"
    elif message.get("tool_calls") or message.get("function_call"):
        finish_reason = "tool_calls"
    return {
        "content": content,
        "reasoning": reasoning or thinking,
        "finish_reason": None if finish_reason is None else str(finish_reason),
        "model": None if model is None else str(model),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "prompt_tokens": int(usage.get("prompt_tokens") or 0),
        "completion_tokens": int(usage.get("completion_tokens") or 0),
    }


def _texts(content: Any) -> tuple[str, str]:
    """(text, thinking) of a message's content: text, null, or parts of both kinds."""
    if content is None or isinstance(content, str):
        return content or "", ""
    text, thinking = "", ""
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, str):
            text += part
        elif isinstance(part, Mapping) and kind in THINKING_PARTS:
            thinking += _texts(part.get("thinking") or part.get("text") or part.get("summary"))[0]
        elif isinstance(part, Mapping) and kind in TEXT_PARTS and isinstance(part.get("text"), str):
            text += part["text"]
        else:
            named = f"a part of type '{kind}'" if kind else f"{type(part).__name__} {part!r:.80}"
            raise UnreadableContentError(
                f"the content of the completion is not text: it has {named}. Set --extra-body or --model so "
                "that the endpoint returns text"
            )
    return text, thinking


def account_problem(status: int, found: Any) -> str | None:
    """The reason in an error response that concerns the account, so that every other request would fail too.

    The statuses 401, 402 and 403 need no such test. The others are a 429 because of an exhausted quota, and a
    200 whose body is an error.
    """
    error = found.get("error", found) if isinstance(found, Mapping) else found
    if not isinstance(error, Mapping):
        error = {"message": error}
    code, message = error.get("code"), str(error.get("message") or "")
    named = f"{code} {error.get('type')}"
    # The message of another status may quote the prompt.
    exhausted = EXHAUSTED.search(f"{named} {message}" if status == 429 else named)
    if exhausted or (status == 200 and str(code) in map(str, REFUSED_ACCOUNT)):
        label = f" ({code})" if code is not None and str(code) not in message else ""
        return f"status {status}: {message or error.get('type')}{label}"
    return None
