"""Reward functions of a completion's words and length.

A constraint gives 1.0 if the completion satisfies it, else 0.0. A completion of only white space satisfies
none, as in IFEval (arXiv 2311.07911).
"""

from typing import Any

from uniapl.errors import UsageError
from uniapl.rewards.finding import register


def completion_text(completion: Any) -> str:
    """The text of a completion: a string, or a list of messages whose last one is the answer."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


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


@register("get_soft_overlong_punishment")
def get_soft_overlong_punishment(
    completion_ids: list[list[int]], *, max_completion_len: int, soft_punish_cache: int
) -> list[float]:
    """A penalty from 0 to -1 for long completions, with TRL's name and values.

    0 up to `max_completion_len - soft_punish_cache` tokens, then linear, -1 from `max_completion_len` on.
    Source: DAPO (arXiv 2503.14476), eq. 13.

    Raises:
        UsageError: `soft_punish_cache` is negative or greater than `max_completion_len`.
    """
    if not 0 <= soft_punish_cache <= max_completion_len:
        raise UsageError(
            f"get_soft_overlong_punishment: soft_punish_cache {soft_punish_cache} must be from 0 to "
            f"max_completion_len ({max_completion_len})"
        )
    free = max_completion_len - soft_punish_cache
    return [
        0.0
        if len(ids) <= free
        else -1.0
        if len(ids) > max_completion_len
        else (free - len(ids)) / soft_punish_cache
        for ids in completion_ids
    ]
