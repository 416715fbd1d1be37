"""Differences and fronts, compared with values computed by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uniapl.compare.statistics import LEVELS, distinguishable, paired_difference, score_at_equal_closeness


def test_a_paired_difference_removes_variation_between_seeds() -> None:
    ours, theirs = [0.1, 0.5, 0.91], [0.0, 0.4, 0.8]
    interval = paired_difference(ours, theirs)
    assert interval["low"] == pytest.approx(0.1033333 - 4.302653 * 0.0057735 / 3**0.5, abs=1e-6)
    equal = paired_difference([0.1, 0.5], [0.0, 0.4])
    assert equal == {"mean": pytest.approx(0.1), "low": None, "high": None}
    with pytest.raises(ValueError, match="longer"):
        paired_difference([0.1], theirs)


def test_the_interval_of_a_paired_difference_by_hand() -> None:
    """Differences 1, 2, 3 (hundredths): Student's t with two degrees of freedom is 4.303."""
    half = 0.01 * 4.302653 / 3**0.5
    interval = paired_difference([0.11, 0.32, 0.53], [0.1, 0.3, 0.5])
    assert interval == pytest.approx({"mean": 0.02, "low": 0.02 - half, "high": 0.02 + half})
    assert paired_difference([0.3], [0.1])["low"] is None, "one seed has no interval"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.1, False), (0.0, 0.1, False), (None, None, False)],
)
def test_an_interval_without_zero_is_distinguishable(
    low: float | None, high: float | None, expected: bool
) -> None:
    assert distinguishable({"mean": 0.1, "low": low, "high": high}) is expected


def test_score_at_equal_closeness_by_hand() -> None:
    points = [(0.2, 1.0), (0.8, 2.0)]
    # Half of the bounds allow only the closer point; a dominated point changes nothing.
    assert score_at_equal_closeness(points, (1.0, 3.0)) == pytest.approx((25 * 0.2 + 25 * 0.8) / LEVELS)
    dominated = [*points, (0.1, 2.5)]
    assert score_at_equal_closeness(dominated, (1.0, 3.0)) == score_at_equal_closeness(points, (1.0, 3.0))
    assert score_at_equal_closeness(points, (0.0, 0.5)) == 0.2, "no point is so close: the lowest score"


unit = st.floats(0, 1)


@given(st.lists(st.tuples(unit, unit), min_size=1), st.tuples(unit, unit))
def test_a_closer_or_better_model_never_lowers_a_front(
    models: list[tuple[float, float]], new: tuple[float, float]
) -> None:
    # The lowest score stands for no model at all, so the new one is not below it.
    after = [*models, (max(new[0], min(score for score, _ in models)), new[1])]
    assert score_at_equal_closeness(after, (0.0, 1.0)) >= score_at_equal_closeness(models, (0.0, 1.0)) - 1e-12
