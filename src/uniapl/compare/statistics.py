"""Paired differences with intervals, and the comparison of fronts of score and closeness."""

import statistics
from collections.abc import Sequence

from uniapl.intervals import Interval, student_interval

LEVELS = 50
"""Points at which two fronts are compared."""

Point = tuple[float, float]
"""(score, distance from the expert) of a trained model; a lower distance is closer."""


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """The mean of our values minus theirs, seed by seed, with Student's 95 % interval.

    The interval is unknown if all differences are equal, which happens with few prompts and tells nothing
    about other seeds.
    """
    values = [a - b for a, b in zip(ours, theirs, strict=True)]
    found = student_interval(values)
    return {**found, "low": None, "high": None} if max(values) - min(values) < 1e-12 else found


def distinguishable(difference: Interval) -> bool:
    """Whether the interval of a difference excludes 0."""
    low, high = difference["low"], difference["high"]
    return low is not None and high is not None and (low > 0 or high < 0)


def score_at_equal_closeness(points: Sequence[Point], bounds: tuple[float, float]) -> float:
    """The best score within a bound on the distance, averaged over bounds; the lowest score if no point
    is."""
    lowest = min(score for score, _ in points)
    return statistics.fmean(
        max((score for score, distance in points if distance <= bound), default=lowest)
        for bound in _levels(*bounds)
    )


def _levels(low: float, high: float) -> list[float]:
    return [low + (high - low) * i / (LEVELS - 1) for i in range(LEVELS)]
