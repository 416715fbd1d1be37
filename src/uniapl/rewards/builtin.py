"""Reward functions included in the package: 1.0 if the completion satisfies a constraint, else 0.0.

A completion of only white space satisfies no constraint, as in IFEval (arXiv 2311.07911).
"""

from typing import Any

from uniapl.rewards.finding import register


def completion_text(completion: Any) -> str:
    """The text of a completion: a string, or a list with one assistant message."""
    return completion if isinstance(completion, str) else completion[0]["content"]


@register("no_comma")
def no_comma(completions: list[Any]) -> list[float]:
    """IFEval's punctuation:no_comma."""
    return [float("," not in text and bool(text.strip())) for text in map(completion_text, completions)]


@register("lowercase")
def lowercase(completions: list[Any]) -> list[float]:
    """IFEval's change_case:english_lowercase, without its language detection."""
    return [float(text.islower()) for text in map(completion_text, completions)]


@register("length")
def length(completions: list[Any], *, max_words: int, min_words: int = 1) -> list[float]:
    """1.0 for `min_words` to `max_words` words, separated by white space."""
    return [float(min_words <= len(text.split()) <= max_words) for text in map(completion_text, completions)]
