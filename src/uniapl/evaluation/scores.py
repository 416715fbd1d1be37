"""Statistics of scores: means with confidence intervals, pass@k, and differences between two models."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

RESAMPLES = 2000
Sums = Float64[np.ndarray, "prompts 2"]
"""For each prompt, the sum of a score's values over the completions, and the number of values."""
Interval = dict[str, float | None]
"""`mean`, `low` and `high`; all None if no value is known."""


def sums_of(completions: Sequence[Sequence[Mapping[str, Sequence[float]]]], score: str) -> Sums:
    """The sums of one score.

    Args:
        completions: For each prompt, the scores of each of its completions.
    """
    values = [[value for one in prompt for value in one[score]] for prompt in completions]
    return as_sums([[sum(one), len(one)] for one in values])


def as_sums(rows: Sequence[Sequence[float | int]]) -> Sums:
    """Pairs of a sum and a count as an array."""
    return np.array(rows, dtype=np.float64).reshape(-1, 2)


def mean_of(sums: Sums) -> float | None:
    """The mean over all values; None if there are none."""
    total, count = sums.sum(0)
    return float(total / count) if count else None


def interval(sums: Sums) -> Interval:
    """The mean with its 95 % interval over prompts: percentile bootstrap (Efron, 1979) with a fixed seed."""
    return _interval(sums[sums[:, 1] > 0])


def difference(ours: Sums, theirs: Sums) -> Interval:
    """Our mean minus theirs with its 95 % interval, over prompts with values in both, resampled as pairs."""
    both = (ours[:, 1] > 0) & (theirs[:, 1] > 0)
    return _interval(ours[both], theirs[both])


def pass_at_all(completions: Sequence[Sequence[Mapping[str, Sequence[float]]]], score: str) -> Sums:
    """The best of each prompt's k completions: pass@k (arXiv 2107.03374) with n = k for a score of 0 or 1."""
    best = [max((v for one in prompt for v in one[score]), default=None) for prompt in completions]
    return as_sums([[one or 0.0, one is not None] for one in best])


def _interval(*models: Sums) -> Interval:
    """The mean of one model, or of the first minus the second; all are resampled at the same prompts."""

    def statistic(prompts: Any) -> float:
        means = [total / count for total, count in (sums[prompts].sum(0) for sums in models)]
        return float(means[0] - sum(means[1:]))

    size = len(models[0])
    if not size:
        return {"mean": None, "low": None, "high": None}
    rng = np.random.default_rng(0)
    resampled = [statistic(rng.integers(0, size, size=size)) for _ in range(RESAMPLES)]
    low, high = np.quantile(resampled, (0.025, 0.975))
    return {"mean": statistic(slice(None)), "low": float(low), "high": float(high)}
