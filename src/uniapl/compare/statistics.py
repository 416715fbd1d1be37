"""Means with intervals, costs to reach a level, and fronts; plain numbers in, plain numbers out."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

RESAMPLES = 10_000
LEVELS = 50
"""Points at which two fronts are compared."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over seeds and its 95 % interval.

    Example:
        Interval(mean=0.04, low=0.01, high=0.07)
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Point:
    """A trained model on the plane of quality and closeness."""

    good: float
    distance: float
    """From the expert, e.g. nats per token of its texts: lower is closer."""


def bootstrap(values: Sequence[float]) -> Interval:
    """Percentile bootstrap of the mean (Efron, 1979): 10,000 resamples from a fixed seed.

    With few values the interval is somewhat too narrow; five paired seeds are few.

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError("no values to resample")
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    low, high = means[round(0.025 * RESAMPLES)], means[round(0.975 * RESAMPLES) - 1]
    return Interval(mean=statistics.fmean(values), low=low, high=high)


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Of our values minus theirs, seed by seed."""
    return bootstrap([a - b for a, b in zip(ours, theirs, strict=True)])


def cost_to_reach(costs: Sequence[float], values: Sequence[float], level: float) -> float | None:
    """The cost at which a curve first reaches a level, on straight lines between its points.

    Args:
        costs: Ascending, the first one that of the untrained model.
        values: At these costs.

    Returns:
        None where the curve stays below the level.
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
    """The best `good` within a bound on the distance, averaged over bounds; 0 where no point keeps it."""
    return statistics.fmean(
        max((p.good for p in points if p.distance <= bound), default=0.0) for bound in _levels(*bounds)
    )


def distance_at_equal_good(points: Sequence[Point], bounds: tuple[float, float], worst: float) -> float:
    """The least distance at a level of `good`, averaged over levels; `worst` where no point reaches it."""
    return statistics.fmean(
        min((p.distance for p in points if p.good >= level), default=worst) for level in _levels(*bounds)
    )


def _levels(low: float, high: float) -> list[float]:
    return [low + (high - low) * i / (LEVELS - 1) for i in range(LEVELS)]
