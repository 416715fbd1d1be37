"""From the scores of single answers to means with intervals, pass@k, and differences of two models."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

RESAMPLES = 2000
Sums = Float64[np.ndarray, "prompts 2"]
"""The sum of a score's values over a prompt's answers, and how many there are."""
Means = Float64[np.ndarray, " resamples"]


def sums_of(answers: Sequence[Sequence[Mapping[str, Sequence[float]]]], score: str) -> Sums:
    """One score over the answers of every prompt, added up.

    Args:
        answers: For each prompt, the scores of each of its answers.
    """
    values = [[value for answer in prompt for value in answer[score]] for prompt in answers]
    return as_sums([[sum(one), len(one)] for one in values])


def as_sums(rows: Sequence[Sequence[float | int]]) -> Sums:
    """Pairs of a sum and a count as an array."""
    return np.array(rows, dtype=np.float64).reshape(-1, 2)


def mean_of(sums: Sums) -> float | None:
    """The mean over all values; None where there is none."""
    total, count = sums.sum(0)
    return float(total / count) if count else None


def interval(sums: Sums) -> dict[str, float | None]:
    """The mean with its 95 % interval over prompts: percentile bootstrap (Efron, 1979), from a fixed seed."""
    known = sums[sums[:, 1] > 0]
    if not len(known):
        return {"mean": None, "low": None, "high": None}
    return {"mean": mean_of(known), **_bounds(_resampled(known))}


def difference(ours: Sums, theirs: Sums) -> dict[str, float | None]:
    """Our mean minus theirs with its interval, over prompts that both have values of, resampled together."""
    both = (ours[:, 1] > 0) & (theirs[:, 1] > 0)
    ours, theirs = ours[both], theirs[both]
    a, b = mean_of(ours), mean_of(theirs)
    if a is None or b is None:
        return {"mean": None, "low": None, "high": None}
    return {"mean": a - b, **_bounds(_resampled(ours) - _resampled(theirs))}


def pass_at_all(answers: Sequence[Sequence[Mapping[str, Sequence[float]]]], score: str) -> Sums:
    """The best of a prompt's k answers: of a score that is 0 or 1, pass@k (arXiv 2107.03374) with n = k."""
    best = [max((v for answer in prompt for v in answer[score]), default=None) for prompt in answers]
    return as_sums([[one or 0.0, one is not None] for one in best])


def _resampled(sums: Sums) -> Means:
    """Means of resampled prompts; the same prompts for every array of one length."""
    rng = np.random.default_rng(0)
    means = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        total, count = sums[rng.integers(0, len(sums), size=len(sums))].sum(0)
        means[index] = total / count
    return means


def _bounds(means: Means) -> dict[str, Any]:
    low, high = np.quantile(means, (0.025, 0.975))
    return {"low": float(low), "high": float(high)}
