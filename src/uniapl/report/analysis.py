"""Statistics for reports: distances between distributions, diversity, smoothing, shown numbers."""

import math
import re
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from uniapl.intervals import student_quantile

Item = TypeVar("Item")
Numbers = Sequence[float | int]


def mean(values: Iterable[float | int | None]) -> float | None:
    """The mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def quantile(values: Numbers, fraction: float) -> float:
    """The value below which a fraction of the values lies, interpolated linearly."""
    return float(np.quantile(values, fraction))


def wasserstein(first: Numbers, second: Numbers) -> float:
    """Wasserstein-1 distance, in the unit of the values: the area between the distribution functions."""
    points, gaps = _cdf_gaps(first, second)
    return float(np.sum(gaps[:-1] * np.diff(points)))


def kolmogorov_smirnov(first: Numbers, second: Numbers) -> float:
    """Largest difference of the distribution functions: 0 for equal samples, 1 for disjoint ranges."""
    return float(max(_cdf_gaps(first, second)[1]))


def _cdf_gaps(first: Numbers, second: Numbers) -> tuple[Any, Any]:
    """The distinct values of both samples, and the differences of the distribution functions there."""
    points = np.unique([*first, *second])
    one, other = (np.searchsorted(np.sort(s), points, side="right") / len(s) for s in (first, second))
    return points, np.abs(one - other)


def bin_edges(samples: Iterable[Numbers], bins: int) -> list[float]:
    """Edges of equally wide bins over all samples; the width is an integer if all values are."""
    values = [value for sample in samples for value in sample]
    low, high = min(values), max(values)
    if all(float(value).is_integer() for value in values):
        width = max(1, math.ceil((high - low + 1) / bins))
        bins = math.ceil((high - low + 1) / width)
    else:
        width = (high - low) / bins or 1.0
    return [float(low + i * width) for i in range(bins + 1)]


def histogram(values: Numbers, edges: Sequence[float]) -> list[float]:
    """The fraction of the values in each bin; bins are half open, except that the last has both edges."""
    # Rounding may put the last edge below the largest value.
    return (np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / len(values)).tolist()


def smoothed(values: Sequence[float | int | None], fraction: float) -> list[float | None]:
    """Exponential moving average with Adam's bias correction; None stays None.

    Args:
        fraction: The window, 1 / (1 - weight), as a fraction of the number of values; at least one value.
    """
    window = max(1.0, fraction * sum(value is not None for value in values))
    weight = 1 - 1 / window
    total = mass = 0.0
    result: list[float | None] = []
    for value in values:
        if value is not None:
            total = weight * total + (1 - weight) * value
            mass = weight * mass + (1 - weight)
        result.append(None if value is None else total / mass)
    return result


def words(text: str) -> list[str]:
    """Words and punctuation marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def distinct(texts: Iterable[str], n: int) -> float | None:
    """Distinct-n (Li et al., 2016): the fraction of distinct n-grams among all n-grams of words."""
    grams: list[tuple[str, ...]] = []
    for text in texts:
        tokens = words(text)
        grams += zip(*(tokens[i:] for i in range(n)), strict=False)
    return distinct_fraction(grams) if grams else None


def distinct_fraction(items: Sequence[Hashable]) -> float:
    """The fraction of distinct items."""
    return len(set(items)) / len(items)


def ends(items: Sequence[Item]) -> tuple[Sequence[Item], Sequence[Item]]:
    """The first and the last tenth, at least five items each; the halves of fewer than ten items."""
    count = max(1, len(items) // 10, min(5, len(items) // 2))
    return items[:count], items[-count:]


def change(values: Numbers) -> dict[str, float | None]:
    """The mean of the last values minus the mean of the first ones, with Student's 95 % interval.

    Returns:
        "mean", "low" and "high"; no interval if `ends` has one value each.
    """
    first, last = ends(values)
    mean = statistics.fmean(last) - statistics.fmean(first)
    if len(first) == 1:
        return {"mean": mean, "low": None, "high": None}
    variance = (statistics.variance(first) + statistics.variance(last)) / len(first)
    half = student_quantile(2 * len(first) - 2) * math.sqrt(variance)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def step_ranges(steps: Iterable[int]) -> str:
    """[3, 4, 5, 9] as "3 to 5, 9"."""
    ranges: list[list[int]] = []
    for step in sorted(set(steps)):
        if ranges and step == ranges[-1][1] + 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    return ", ".join(f"{low}" if low == high else f"{low} to {high}" for low, high in ranges)


def number(value: Any) -> float | int | None:
    """The value if it is a finite number, else None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def decimal(value: float, digits: int = 3, sign: str = "") -> str:
    """The value with this many decimal places; with up to six if it would else look like an integer.

    Example:
        >>> [decimal(value) for value in (0.5, 1.0, 0.9998, 0.00004)]
        ['0.500', '1.000', '0.9998', '0.00004']
    """
    while digits < 6 and value != round(value) == round(value, digits):
        digits += 1
    return f"{value:{sign}.{digits}f}"


def interval_text(value: Mapping[str, float | None], sign: str = "") -> str:
    """A mean with its 95 % interval in square brackets, if it has one."""
    mean, low, high = (value[name] for name in ("mean", "low", "high"))
    if mean is None:
        return ""
    text = decimal(mean, sign=sign)
    return (
        text
        if low is None or high is None
        else f"{text} [{decimal(low, sign=sign)}, {decimal(high, sign=sign)}]"
    )


def rounded(value: Any) -> Any:
    """A number with five significant digits, which is enough for a page; None if it is not finite."""
    known = number(value)
    return known if known is None or isinstance(known, int) else float(f"{known:.5g}")
