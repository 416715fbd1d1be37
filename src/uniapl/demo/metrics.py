"""What a text of the demo task is worth, as metrics of an evaluation suite (`evaluation.metrics`).

The rewards of the task do not measure fluency and style, so that these show what a reward misses.
"""

from collections.abc import Sequence
from typing import Any

from uniapl.demo.constraints import Constraint
from uniapl.demo.language import PLACES, fluency

METRICS = tuple(f"uniapl.demo.metrics:{name}" for name in ("good", "passed", "fluent", "place_habit"))
"""The metrics of the task's recipe; the first is the main score."""


def good(completions: list[Any], constraints: list[Any]) -> list[float]:
    """1 if the text satisfies every constraint and its fluency is 1."""
    both = zip(passed(completions, constraints), fluent(completions), strict=True)
    return [float(satisfied == 1 and fluency == 1) for satisfied, fluency in both]


def passed(completions: list[Any], constraints: list[Any]) -> list[float]:
    """1 if the text satisfies every constraint."""
    return [
        float(all(Constraint(kind, argument).satisfied_by(text) for kind, argument in wanted))
        for text, wanted in zip(texts_of(completions), constraints, strict=True)
    ]


def fluent(completions: list[Any]) -> list[float]:
    """Fraction of well-formed, distinct sentences."""
    return [fluency(text) for text in texts_of(completions)]


def place_habit(completions: list[Any], constraints: list[Any]) -> list[float | None]:
    """1 if the text mentions a place, a habit of the expert; None if the prompt does not leave it open."""
    return [
        None if _constrains_places(wanted) else float(any(word in PLACES for word in text.split()))
        for text, wanted in zip(texts_of(completions), constraints, strict=True)
    ]


def texts_of(completions: Sequence[Any]) -> list[str]:
    """The texts of completions, which are chats or plain texts."""
    return [c if isinstance(c, str) else c[0]["content"] for c in completions]


def _constrains_places(constraints: Sequence[Sequence[Any]]) -> bool:
    """Whether a prompt asks for a place, forbids places, or limits the words."""
    return any(
        kind in ("place", "max_words") or argument == "place" or argument in PLACES
        for kind, argument in constraints
    )
