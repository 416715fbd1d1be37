"""The reward of gsm8k.yaml: whether the final answer of a completion equals that of the solution."""

import re
from decimal import Decimal
from typing import Any

FINAL_ANSWER = re.compile(r"####\s*\$?(-?[\d,]*\.?\d+)")


def final_answer(text: str) -> Decimal | None:
    """The number after the last '####'; None if there is none."""
    found = FINAL_ANSWER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def exact_answer(completions: list[Any], answer: list[str]) -> list[float]:
    """1 for a completion whose final answer equals the solution's, else 0; `answer` is a column of GSM8K."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    answers = [
        (final_answer(text), final_answer(solution)) for text, solution in zip(texts, answer, strict=True)
    ]
    return [float(ours is not None and ours == theirs) for ours, theirs in answers]
