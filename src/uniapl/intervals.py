"""95 % confidence intervals of means: Student's t for any values, Wilson's for rates."""

import functools
import math
import statistics
from collections.abc import Sequence

NORMAL = statistics.NormalDist().inv_cdf(0.975)

Interval = dict[str, float | None]
"""`mean`, `low` and `high`, the bounds of the 95 % interval; None where a value is unknown."""


def student_interval(values: Sequence[float]) -> Interval:
    """The mean of independent values with Student's t interval (Student, 1908).

    The interval is exact for normally distributed values, however few there are. One value has no interval;
    equal values have one of width 0.

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError("no values")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return {"mean": mean, "low": None, "high": None}
    half = student_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def wilson_bounds(rate: float, size: float, quantile: float = NORMAL) -> tuple[float, float]:
    """The score interval of a rate (Wilson, 1927), which has a positive width also at 0 and 1.

    Args:
        rate: Fraction of successes, from 0 to 1.
        size: Number of trials; for trials that depend on each other, of independent ones with the same
            variance.
        quantile: 97.5 % quantile of the rate's standardised error.
    """
    square = quantile**2
    centre = (rate + square / (2 * size)) / (1 + square / size)
    half = quantile / (1 + square / size) * math.sqrt(rate * (1 - rate) / size + square / (4 * size**2))
    return max(0.0, centre - half), min(1.0, centre + half)


@functools.cache
def student_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t distribution with this many degrees of freedom."""
    if degrees > 200:
        # Abramowitz and Stegun (1964), 26.7.5; the error is below 1e-6.
        third = (NORMAL**3 + NORMAL) / (4 * degrees)
        fifth = (5 * NORMAL**5 + 16 * NORMAL**3 + 3 * NORMAL) / (96 * degrees**2)
        return NORMAL + third + fifth
    low, high = NORMAL, 13.0
    while high - low > 1e-10:
        middle = (low + high) / 2
        low, high = (middle, high) if _central_probability(middle, degrees) < 0.95 else (low, middle)
    return (low + high) / 2


def _central_probability(t: float, degrees: int) -> float:
    """P(-t < T < t) for Student's t distribution: Abramowitz and Stegun (1964), 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term = math.sin(angle) * (math.cos(angle) if odd else 1.0)
    total = 0.0
    for k in range(odd + 1, degrees, 2):
        total += term
        term *= math.cos(angle) ** 2 * k / (k + 1)
    return 2 / math.pi * (angle + total) if odd else total
