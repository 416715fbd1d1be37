"""Means with intervals, costs to reach a level, and fronts of quality and closeness."""

import random
import statistics
from collections.abc import Sequence

RESAMPLES = 10_000
LEVELS = 50
"""Points at which two fronts are compared."""

Interval = dict[str, float]
"""A mean over seeds and its 95 % interval: {"mean", "low", "high"}."""
Point = tuple[float, float]
"""(good, distance from the expert) of a trained model; a lower distance is closer."""


def bootstrap(values: Sequence[float]) -> Interval:
    """Percentile bootstrap of the mean (Efron, 1979): 10,000 resamples from a fixed seed.

    The interval is slightly too narrow for few values, such as five seeds.

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError("no values to resample")
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    low, high = means[round(0.025 * RESAMPLES)], means[round(0.975 * RESAMPLES) - 1]
    return {"mean": statistics.fmean(values), "low": low, "high": high}


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """The interval of our values minus theirs, seed by seed."""
    return bootstrap([a - b for a, b in zip(ours, theirs, strict=True)])


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
