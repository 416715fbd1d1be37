"""What a report computes: distances of distributions, diversity, smoothing; plain numbers in and out."""

import math
import re
import statistics
from bisect import bisect_right
from collections.abc import Hashable, Iterable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

Item = TypeVar("Item")
Numbers = Sequence[float | int]

# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond the last the normal one.
STUDENT = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228,
    11: 2.201, 12: 2.179, 13: 2.160, 14: 2.145, 15: 2.131, 16: 2.120, 17: 2.110, 18: 2.101, 19: 2.093,
}  # fmt: skip
NORMAL = 1.960


def mean(values: Iterable[float | int | None]) -> float | None:
    """Of the values that are known; None if none is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def mean_interval(values: Numbers) -> tuple[float, float, float]:
    """(mean, low, high): Student's 95 % interval of the mean; of one value, that value thrice."""
    centre = statistics.fmean(values)
    if len(values) < 2:
        return centre, centre, centre
    quantile = STUDENT.get(len(values) - 1, NORMAL)
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return centre, centre - half, centre + half


def quantile(values: Numbers, share: float) -> float:
    """The value below which a share of the values lies, on straight lines between them."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def wasserstein(first: Numbers, second: Numbers) -> float:
    """Wasserstein-1: the area between the two distribution functions, in the values' own unit."""
    a, b = sorted(first), sorted(second)
    points = sorted({*a, *b})
    return math.fsum(
        abs(bisect_right(a, low) / len(a) - bisect_right(b, low) / len(b)) * (high - low)
        for low, high in pairwise(points)
    )


def kolmogorov_smirnov(first: Numbers, second: Numbers) -> float:
    """The largest difference between the two distribution functions: 0 are the same, 1 do not overlap."""
    a, b = sorted(first), sorted(second)
    return max(abs(bisect_right(a, x) / len(a) - bisect_right(b, x) / len(b)) for x in {*a, *b})


def bin_edges(samples: Iterable[Numbers], bins: int) -> list[float]:
    """Edges of equal bins over all the samples; whole numbers get bins of a whole width."""
    values = [value for sample in samples for value in sample]
    low, high = min(values), max(values)
    if all(float(value).is_integer() for value in values):
        width = max(1, math.ceil((high - low + 1) / bins))
        count = math.ceil((high - low + 1) / width)
        return [float(low + i * width) for i in range(count + 1)]
    width = (high - low) / bins or 1.0
    return [low + i * width for i in range(bins + 1)]


def histogram(values: Numbers, edges: Sequence[float]) -> list[float]:
    """The share of the values in each bin; a bin holds its lower edge, the last one its upper edge too."""
    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[min(bisect_right(edges, value), len(counts)) - 1] += 1
    return [count / len(values) for count in counts]


def smoothed(values: Sequence[float | int | None], weight: float) -> list[float | None]:
    """Exponential moving average that does not favour its start (Adam's correction); gaps stay gaps."""
    total = mass = 0.0
    result: list[float | None] = []
    for value in values:
        if value is None:
            result.append(None)
            continue
        total = weight * total + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        result.append(total / mass)
    return result


def words(text: str) -> list[str]:
    """Words and marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def distinct(texts: Iterable[str], n: int) -> float | None:
    """Distinct-n (Li et al., 2016): the share of all n-grams of words that are different ones."""
    grams: list[tuple[str, ...]] = []
    for text in texts:
        tokens = words(text)
        grams += zip(*(tokens[i:] for i in range(n)), strict=False)
    return len(set(grams)) / len(grams) if grams else None


def distinct_share(items: Sequence[Hashable]) -> float:
    """The share of different ones."""
    return len(set(items)) / len(items)


def ends(items: Sequence[Item]) -> tuple[Sequence[Item], Sequence[Item]]:
    """The first and the last tenth, at least one each."""
    count = max(1, len(items) // 10)
    return items[:count], items[-count:]


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
    """The value where it is a finite number, None otherwise; metrics may be missing, null or text."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def rounded(value: Any) -> Any:
    """A number with five significant digits: what a page shows needs no more."""
    known = number(value)
    if known is None or isinstance(known, int):
        return known
    return float(f"{known:.5g}")
