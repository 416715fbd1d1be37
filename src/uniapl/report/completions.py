"""Sampled completions as compressed columns, small enough for one page."""

import base64
import gzip
import json
from collections.abc import Sequence
from typing import Any

from uniapl.report.analysis import rounded
from uniapl.report.reading import Record
from uniapl.report.trajectories import is_trajectory, parts, tool_counts, turns

BUDGET = 7_500_000
"""Bytes for the packed completions, of the 10 MB that a page may have."""
PLAIN = {"text": "text", "tokens": "tokens", "finish_reason": "finish"}
NUMERIC = {"reward": "reward", "advantage": "advantage", "win_rate": "win"}
"""Keys of a completion in completions.jsonl, and the columns of the page that hold them."""


def pack(value: Any) -> str:
    """Compressed JSON in base64, which needs no escaping in HTML."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Decoded tokens may contain lone surrogates, which UTF-8 cannot encode.
    return base64.b64encode(gzip.compress(text.encode(errors="replace"), 6, mtime=0)).decode()


def packed_completions(records: Sequence[Record], budget: int = BUDGET) -> tuple[str, int, int]:
    """The completions, packed; an even sample of the prompts over all steps if they exceed the budget.

    Returns:
        The packed text, the number of completions in it, and the number of all completions.
    """
    total = sum(len(record["completions"]) for record in records)
    keep = len(records)
    while True:
        kept = [records[index * len(records) // keep] for index in range(keep)]
        packed = pack(as_columns(kept))
        if len(packed) <= budget or keep <= 1:
            return packed, sum(len(record["completions"]) for record in kept), total
        keep = max(1, int(keep * 0.95 * budget / len(packed)))


def as_columns(records: Sequence[Record]) -> dict[str, Any]:
    """One list per property of a completion; prompts and demonstrations are stored once and referred to.

    Example:
        {"prompts": ["Name a prime."], "experts": ["11"], "functions": ["is_prime"], "step": [1, 1],
         "group": [0, 0], "prompt": [0, 0], "text": ["7", "9"], "parts": [[1.0, 0.0]], ...}

    With tools there are also `turns`, `tools` (`tool_counts`), and `expert_turns` next to `experts`.
    """
    prompts: dict[tuple[str, str | None], int] = {}
    rows = [(group, completion) for group, r in enumerate(records) for completion in r["completions"]]
    functions = list({name: None for _, completion in rows for name in completion["rewards"]})
    keys = [(readable_prompt(record["prompt"]), record.get("demonstration")) for record in records]
    shown = {key: record.get("demonstration_segments") for key, record in zip(keys, records, strict=True)}
    places = [prompts.setdefault(key, len(prompts)) for key in keys]
    columns = {
        "prompts": [prompt for prompt, _ in prompts],
        "experts": [expert for _, expert in prompts],
        "functions": functions,
        "parts": [[rounded(c["rewards"].get(name)) for _, c in rows] for name in functions],
        "step": [records[group]["step"] for group, _ in rows],
        "group": [group for group, _ in rows],
        "replaced": [int(bool(records[group].get("discarded"))) for group, _ in rows],
        "prompt": [places[group] for group, _ in rows],
        **{column: [completion[key] for _, completion in rows] for key, column in PLAIN.items()},
        **{column: [rounded(completion[key]) for _, completion in rows] for key, column in NUMERIC.items()},
    }
    if any(shown.values()):
        columns["expert_turns"] = [parts(found) if (found := shown[key]) else None for key in prompts]
    if any(is_trajectory(completion) for _, completion in rows):
        columns["turns"] = [turns(completion) for _, completion in rows]
        columns["tools"] = [tool_counts(completion) for _, completion in rows]
        # The turns have the text.
        columns["text"] = ["" if is_trajectory(completion) else completion["text"] for _, completion in rows]
    return columns


def readable_prompt(prompt: Any) -> str:
    """A string as it is, and a chat's messages with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].get("role") == "user":
        return str(prompt[0]["content"])
    return "\n\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in prompt)
