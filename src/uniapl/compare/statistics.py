"""Paired differences with intervals, costs to reach a level, and fronts of quality and closeness."""

import statistics
from collections.abc import Sequence

from uniapl.intervals import Interval, student_interval

LEVELS = 50
"""Points at which two fronts are compared."""

Point = tuple[float, float]
"""(good, distance from the expert) of a trained model; a lower distance is closer."""


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """The mean of our values minus theirs, seed by seed, with Student's 95 % interval."""
    return student_interval([a - b for a, b in zip(ours, theirs, strict=True)])


def cost_to_reach(costs: Sequence[float], values: Sequence[float], level: float) -> float | None:
    """The cost at which a curve first reaches a level, interpolated linearly; None if it never does.

    Args:
        costs: Ascending costs; the first is that of the untrained model.
        values: The curve's values at these costs.
    """
    before: tuple[float, float] | None = None
    for cost, value in zip(costs, values, strict=True):
        if value >= level:
            if before is None or value == before[1]:
                return cost
            return before[0] + (cost - before[0]) * (level - before[1]) / (value - before[1])
        before = cost, value
    return None


def good_at_equal_closeness(points: Sequence[Point], bounds: tuple[float, float]) -> float:
    """The best `good` within a bound on the distance (0 if no point is), averaged over bounds."""
    return statistics.fmean(
        max((good for good, distance in points if distance <= bound), default=0.0)
        for bound in _levels(*bounds)
    )


def distance_at_equal_good(points: Sequence[Point], bounds: tuple[float, float], worst: float) -> float:
    """The least distance at a level of `good` (`worst` if no point reaches it), averaged over levels."""
    return statistics.fmean(
        min((distance for good, distance in points if good >= level), default=worst)
        for level in _levels(*bounds)
    )


def _levels(low: float, high: float) -> list[float]:
    return [low + (high - low) * i / (LEVELS - 1) for i in range(LEVELS)]
