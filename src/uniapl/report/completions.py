"""Sampled answers as columns, small enough for one file; and how data is packed into a page."""

import base64
import gzip
import json
from collections.abc import Sequence
from typing import Any

from uniapl.report.analysis import rounded
from uniapl.report.reading import Record

BUDGET = 7_500_000
"""Bytes that the packed answers may take, of the 10 MB that a page may have."""


def pack(value: Any) -> str:
    """JSON, compressed, as text that is inert in HTML."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Lone surrogates, which a tokenizer may leave, are no UTF-8.
    return base64.b64encode(gzip.compress(text.encode(errors="replace"), 6, mtime=0)).decode()


def packed_completions(records: Sequence[Record], budget: int = BUDGET) -> tuple[str, int, int]:
    """The answers, packed; where they are too large an even sample of prompts over all steps.

    Returns:
        The text, how many answers it holds, and how many there are.
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
    """One list per property of an answer, and prompts and demonstrations once, which answers refer to.

    Example:
        {"prompts": ["Name a prime."], "experts": ["11"], "functions": ["is_prime"], "step": [1, 1],
         "group": [0, 0], "prompt": [0, 0], "text": ["7", "9"], "parts": [[1.0, 0.0]], ...}
    """
    prompts: dict[tuple[str, str | None], int] = {}
    functions = list(
        {name: None for record in records for a in record["completions"] for name in a["rewards"]}
    )
    columns: dict[str, list[Any]] = {name: [] for name in ("step", "group", "prompt", "text", "tokens")}
    columns |= {name: [] for name in ("finish", "reward", "advantage", "win")}
    parts: list[list[Any]] = [[] for _ in functions]
    for group, record in enumerate(records):
        key = (readable_prompt(record["prompt"]), record.get("demonstration"))
        prompt = prompts.setdefault(key, len(prompts))
        for answer in record["completions"]:
            columns["step"].append(record["step"])
            columns["group"].append(group)
            columns["prompt"].append(prompt)
            columns["text"].append(answer["text"])
            columns["tokens"].append(answer["tokens"])
            columns["finish"].append(answer["finish_reason"])
            columns["reward"].append(rounded(answer["reward"]))
            columns["advantage"].append(rounded(answer["advantage"]))
            columns["win"].append(rounded(answer["win_rate"]))
            for values, name in zip(parts, functions, strict=True):
                values.append(rounded(answer["rewards"].get(name)))
    return {
        "prompts": [prompt for prompt, _ in prompts],
        "experts": [expert for _, expert in prompts],
        "functions": functions,
        "parts": parts,
        **columns,
    }


def readable_prompt(prompt: Any) -> str:
    """A prompt as a person reads it: a string, or a chat's turns, each after its role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].get("role") == "user":
        return str(prompt[0]["content"])
    return "\n\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in prompt)
