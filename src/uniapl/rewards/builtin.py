"""Reward functions that come with the package: 1.0 where the answer satisfies a constraint, else 0.0.

An answer of white space alone satisfies nothing, as in IFEval (arXiv 2311.07911).
"""

from typing import Any

from uniapl.rewards.finding import register


def answer_text(completion: Any) -> str:
    """The text of a completion: a string, or one assistant message."""
    return completion if isinstance(completion, str) else completion[0]["content"]


@register("no_comma")
def no_comma(completions: list[Any]) -> list[float]:
    """IFEval's punctuation:no_comma."""
    return [float("," not in text and bool(text.strip())) for text in map(answer_text, completions)]


@register("lowercase")
def lowercase(completions: list[Any]) -> list[float]:
    """IFEval's change_case:english_lowercase, without its language detection."""
    return [float(text.islower()) for text in map(answer_text, completions)]


@register("length")
def length(completions: list[Any], *, max_words: int, min_words: int = 1) -> list[float]:
    """Between `min_words` and `max_words` words separated by white space."""
    return [float(min_words <= len(text.split()) <= max_words) for text in map(answer_text, completions)]
