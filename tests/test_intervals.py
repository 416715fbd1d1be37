"""Quantiles against published tables, intervals by hand, and how often they cover the truth."""

import math
import random
import statistics

import pytest

from uniapl.intervals import student_interval, student_quantile, wilson_bounds

# Two-sided 95 % points of Student's t distribution, from Abramowitz and Stegun (1964), table 26.10.
TABLE = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    10: 2.228,
    19: 2.093,
    30: 2.042,
    60: 2.0,
    120: 1.980,
}


@pytest.mark.parametrize(("degrees", "expected"), TABLE.items())
def test_quantiles_of_students_t(degrees: int, expected: float) -> None:
    assert student_quantile(degrees) == pytest.approx(expected, abs=5.1e-4)


def test_quantiles_fall_to_the_normal_one() -> None:
    quantiles = [student_quantile(degrees) for degrees in range(1, 400)]
    assert quantiles == sorted(quantiles, reverse=True)
    assert student_quantile(200) - student_quantile(201) < 1e-4, "the two formulas meet"
    assert student_quantile(10**9) == pytest.approx(1.959964, abs=1e-6)


def test_the_interval_of_a_mean_by_hand() -> None:
    """1, 2, 3: standard error 1 / sqrt(3), t with two degrees of freedom 4.303."""
    half = 4.302653 / math.sqrt(3)
    assert student_interval([1.0, 2.0, 3.0]) == pytest.approx({"mean": 2, "low": 2 - half, "high": 2 + half})
    assert student_interval([5.0]) == {"mean": 5.0, "low": None, "high": None}, "one value has no spread"
    assert student_interval([0.5, 0.5]) == {"mean": 0.5, "low": 0.5, "high": 0.5}
    with pytest.raises(ValueError, match="no values"):
        student_interval([])


@pytest.mark.case(24)
@pytest.mark.parametrize("seeds", [3, 5])
def test_differences_of_few_seeds_are_covered_in_95_of_100_cases(seeds: int) -> None:
    rng = random.Random(seeds)
    covered = 0
    for _ in range(10_000):
        found = student_interval([rng.gauss(0.0, 0.02) for _ in range(seeds)])
        low, high = found["low"], found["high"]
        assert low is not None
        assert high is not None
        covered += low <= 0 <= high
    # The standard error of the simulation is 0.002. The percentile bootstrap covered 0.73 and 0.84.
    assert covered / 10_000 == pytest.approx(0.95, abs=0.01)


def test_rates_by_hand() -> None:
    """0 of 30: from 0 to z^2 / (30 + z^2)."""
    square = 1.959964**2
    assert wilson_bounds(0.0, 30) == pytest.approx((0.0, square / (30 + square)))
    assert wilson_bounds(1.0, 30) == pytest.approx((30 / (30 + square), 1.0))
    # Agresti and Coull (1998): 10 of 20.
    assert wilson_bounds(0.5, 20) == pytest.approx((0.2993, 0.7007), abs=1e-4)


def coverage(rate: float, size: int) -> float:
    """The exact probability that the interval contains the rate."""
    inside = 0.0
    for successes in range(size + 1):
        low, high = wilson_bounds(successes / size, size)
        if low <= rate <= high:
            inside += math.comb(size, successes) * rate**successes * (1 - rate) ** (size - successes)
    return inside


def test_coverage_of_rates() -> None:
    """Counts are discrete, so the coverage varies with the rate: 0.95 on average, at 30 trials 0.92 to 0.98
    between rates of 0.02 and 0.98."""
    assert coverage(0.02, 30) == pytest.approx(0.978, abs=0.001)
    assert coverage(0.98, 30) == pytest.approx(0.978, abs=0.001)
    assert coverage(0.5, 30) == pytest.approx(0.957, abs=0.001)
    rates = [0.02 + 0.96 * i / 200 for i in range(201)]
    covered = [coverage(rate, 30) for rate in rates]
    assert statistics.fmean(covered) == pytest.approx(0.953, abs=0.005)
    assert min(covered) > 0.9
