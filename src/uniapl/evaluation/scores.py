"""Statistics of scores: means with confidence intervals, pass@k, and differences between two models."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float64

from uniapl.intervals import NORMAL, Interval, student_interval, student_quantile, wilson_bounds

Sums = Float64[np.ndarray, "prompts 2"]
"""For each prompt, the sum of a score's values over the completions, and the number of values."""
Values = Float64[np.ndarray, " prompts"]


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
    """The mean over all values with its 95 % interval, over prompts that are drawn independently.

    Wilson's interval for values from 0 to 1. Several values of a prompt depend on each other: they count as
    the number of independent values whose mean would vary as much (Dean and Pagano, 2015), at 0 and 1 as one.
    Student's t interval for other values; it is unknown if they are equal.
    """
    sums = sums[sums[:, 1] > 0]
    if not len(sums):
        return {"mean": None, "low": None, "high": None}
    if not _is_rate(sums):
        return _student(_per_prompt(sums))
    size, rate = len(sums), float(sums[:, 0].sum() / sums[:, 1].sum())
    quantile = NORMAL
    plain = bool((sums[:, 1] == 1).all()) and _is_binary(sums)
    variance = float(_per_prompt(sums).var(ddof=1)) if size > 1 else 0.0
    if not plain and variance > 0:
        size, quantile = rate * (1 - rate) * size / variance, student_quantile(size - 1)
    low, high = wilson_bounds(rate, size, quantile)
    return {"mean": rate, "low": low, "high": high}


def difference(ours: Sums, theirs: Sums) -> Interval:
    """Our mean minus theirs with its 95 % interval, over prompts with values in both, as pairs.

    Student's t interval over the prompts' differences. For values of 0 or 1 it includes two more prompts, one
    that only we pass and one that only they pass (Bonett and Price, 2012), so that equal answers to few
    prompts do not give an interval of width 0. With several values per prompt, these two differ by as much as
    the other prompts that differ. For other values the interval is unknown if the differences are equal.
    """
    both = (ours[:, 1] > 0) & (theirs[:, 1] > 0)
    if not both.any():
        return {"mean": None, "low": None, "high": None}
    ours, theirs = ours[both], theirs[both]
    values = _per_prompt(ours) - _per_prompt(theirs)
    if not (_is_binary(ours) and _is_binary(theirs)):
        return _student(values)
    differing = values[values != 0]
    step = math.sqrt((differing**2).mean()) if len(differing) else 1.0
    found = student_interval([*values.tolist(), step, -step])
    low, high = found["low"], found["high"]
    assert low is not None
    assert high is not None
    return {"mean": float(values.mean()), "low": max(-1.0, low), "high": min(1.0, high)}


def pass_at_all(completions: Sequence[Sequence[Mapping[str, Sequence[float]]]], score: str) -> Sums:
    """The best of each prompt's k completions: pass@k (arXiv 2107.03374) with n = k for a score of 0 or 1.

    A prompt has a value only if all k completions have a score. The best of fewer would be too low, and to
    keep only those prompts whose known completions pass would make the mean too high.
    """
    best = [
        max(v for one in prompt for v in one[score]) if all(one[score] for one in prompt) else None
        for prompt in completions
    ]
    return as_sums([[one or 0.0, one is not None] for one in best])


def pass_bounds(
    completions: Sequence[Sequence[Mapping[str, Sequence[float]]]], score: str
) -> tuple[float, float] | None:
    """pass@k over every prompt with a scored completion, if no unknown completion passes, and if all do.

    None if no completion of such a prompt is unknown, or if a score is outside 0 to 1.
    """
    known = [[v for one in prompt for v in one[score]] for prompt in completions]
    prompts = [
        (max(values), all(one[score] for one in prompt))
        for values, prompt in zip(known, completions, strict=True)
        if values
    ]
    if all(complete for _, complete in prompts) or not all(0 <= v <= 1 for values in known for v in values):
        return None
    worst = [best for best, _ in prompts]
    best = [best if complete else 1.0 for best, complete in prompts]
    return sum(worst) / len(prompts), sum(best) / len(prompts)


def _per_prompt(sums: Sums) -> Values:
    """One value per prompt whose mean is the mean over all values: that of a ratio's linearisation."""
    total, count = sums.sum(0)
    mean = total / count
    return mean + (sums[:, 0] - mean * sums[:, 1]) * len(sums) / count


def _is_rate(sums: Sums) -> bool:
    return bool(((sums[:, 0] >= 0) & (sums[:, 0] <= sums[:, 1])).all())


def _is_binary(sums: Sums) -> bool:
    """Every value is 0 or 1, or the sums look as if they were."""
    return _is_rate(sums) and bool((sums[:, 0] == sums[:, 0].round()).all())


def _student(values: Values) -> Interval:
    found = student_interval(values.tolist())
    equal = np.allclose(values, values[0], rtol=1e-9, atol=1e-12)
    return {**found, "low": None, "high": None} if equal else found
