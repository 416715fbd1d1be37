"""Completions that call tools as turns: the parts that were written, and the parts that were given."""

import json
from collections.abc import Sequence
from typing import Any

from uniapl.report.reading import Record

MAX_CHARACTERS = 20_000
"""Characters of the results of a turn, and of the arguments of a call, that a page has. Our choice:
rollout.max_tool_result_length is 4000 by default."""
END_OF_THOUGHT = "</think>"
"""Calls are read after it, as by `uniapl.tools.calls.CallParser`."""


def is_trajectory(completion: Record) -> bool:
    """Whether the completion is one of a run with tools."""
    return "segments" in completion


def turns(completion: Record) -> list[dict[str, Any]] | None:
    """The parts of a completion in their order; None for a completion without tools.

    Returns:
        For a part that the policy wrote {"thought", "text", "calls": [[name, arguments, state], ...],
        "malformed"}, where the state is "answered", "failed", "unanswered" (after the last iteration) or
        "unread" (the result did not fit in the completion); for a part that it read {"given", "title"}.
    """
    if not is_trajectory(completion):
        return None
    use, found, executed = completion["tool_use"], parts(completion["segments"]), 0
    written = [part for part in found if "given" not in part]
    answers = _by_turn(completion["messages"])
    for part, (message, results) in zip(written, answers, strict=False):
        calls = message.get("tool_calls", [])
        states = ["unanswered"] * len(calls)
        if not (use["unanswered"] and message is answers[-1][0]):
            usual = "answered" if results else "unread"
            numbers = range(executed, executed + len(calls))
            states = ["failed" if number in use["failures"] else usual for number in numbers]
            executed += len(calls)
        part["calls"] = [[*_call(call), state] for call, state in zip(calls, states, strict=True)]
    read = [part for part in found if "given" in part]
    for part, (_, results) in zip(read, answers, strict=False):
        part["title"] = ", ".join(str(result.get("name") or result["role"]) for result in results)
    if written and use["malformed"]:
        written[-1]["malformed"] = True
    return found


def parts(segments: Sequence[Record]) -> list[dict[str, Any]]:
    """The parts without their calls, of the policy or of a demonstration."""
    found: list[dict[str, Any]] = []
    for segment in segments:
        thought, end, text = segment["text"].rpartition(END_OF_THOUGHT)
        if segment["written"]:
            found.append({"thought": thought + end, "text": text, "calls": [], "malformed": False})
        else:
            found.append({"given": shortened(segment["text"]), "title": ""})
    return found


def tool_counts(completion: Record) -> list[int] | None:
    """Calls, failed, malformed and unanswered ones; None for a completion without tools."""
    if not is_trajectory(completion):
        return None
    use = completion["tool_use"]
    return [use["calls"], len(use["failures"]), use["malformed"], use["unanswered"]]


def written_text(completion: Record) -> str:
    """The text that the policy wrote, without results of tools."""
    if not is_trajectory(completion):
        return completion["text"]
    return "".join(segment["text"] for segment in completion["segments"] if segment["written"])


def shortened(text: str) -> str:
    """The text, cut after MAX_CHARACTERS with a note of how much is missing."""
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]}… ({len(text) - MAX_CHARACTERS:,} more characters in completions.jsonl)"


def _by_turn(messages: Sequence[Record]) -> list[tuple[Record, list[Record]]]:
    """Each message of the policy, with the results that follow it."""
    found: list[tuple[Record, list[Record]]] = []
    for message in messages:
        if message["role"] == "assistant":
            found.append((message, []))
        elif found:
            found[-1][1].append(message)
    return found


def _call(call: Record) -> tuple[str, str]:
    function = call.get("function", call)
    arguments = json.dumps(function.get("arguments", {}), ensure_ascii=False)
    return str(function.get("name")), shortened(arguments)
