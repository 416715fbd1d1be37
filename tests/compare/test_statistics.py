"""Differences, costs and fronts, compared with values computed by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uniapl.compare.statistics import (
    LEVELS,
    cost_to_reach,
    distance_at_equal_good,
    good_at_equal_closeness,
    paired_difference,
)


def test_a_paired_difference_removes_variation_between_seeds() -> None:
    ours, theirs = [0.1, 0.5, 0.9], [0.0, 0.4, 0.8]
    interval = paired_difference(ours, theirs)
    assert interval["low"] == pytest.approx(0.1)
    assert interval["high"] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="longer"):
        paired_difference([0.1], theirs)


def test_the_interval_of_a_paired_difference_by_hand() -> None:
    """Differences 1, 2, 3 (hundredths): Student's t with two degrees of freedom is 4.303."""
    half = 0.01 * 4.302653 / 3**0.5
    interval = paired_difference([0.11, 0.32, 0.53], [0.1, 0.3, 0.5])
    assert interval == pytest.approx({"mean": 0.02, "low": 0.02 - half, "high": 0.02 + half})
    assert paired_difference([0.3], [0.1])["low"] is None, "one seed has no interval"


@pytest.mark.parametrize(
    ("level", "cost"),
    [(0.1, 0.0), (0.2, 0.0), (0.3, 5.0), (0.4, 10.0), (0.5, 25.0), (0.6, 30.0), (0.7, None)],
)
def test_the_cost_is_interpolated_linearly(level: float, cost: float | None) -> None:
    # The dip at 20 does not count: the level was reached before.
    found = cost_to_reach([0.0, 10.0, 20.0, 30.0], [0.2, 0.4, 0.4, 0.6], level)
    assert found == (cost if cost is None else pytest.approx(cost))


def test_good_at_equal_closeness_by_hand() -> None:
    points = [(0.2, 1.0), (0.8, 2.0)]
    # Half of the bounds allow only the closer point; a dominated point changes nothing.
    assert good_at_equal_closeness(points, (1.0, 3.0)) == pytest.approx((25 * 0.2 + 25 * 0.8) / LEVELS)
    dominated = [*points, (0.1, 2.5)]
    assert good_at_equal_closeness(dominated, (1.0, 3.0)) == good_at_equal_closeness(points, (1.0, 3.0))
    assert good_at_equal_closeness(points, (0.0, 0.5)) == 0


def test_distance_at_equal_good_by_hand() -> None:
    points = [(0.5, 1.0), (1.0, 2.0)]
    assert distance_at_equal_good(points, (0.0, 1.0), 3.0) == pytest.approx((25 * 1.0 + 25 * 2.0) / LEVELS)
    assert distance_at_equal_good(points[:1], (0.0, 1.0), 3.0) == pytest.approx(
        (25 * 1.0 + 25 * 3.0) / LEVELS
    )


unit = st.floats(0, 1)


@given(st.lists(st.tuples(unit, unit), min_size=1), st.tuples(unit, unit))
def test_another_model_never_lowers_a_front(
    models: list[tuple[float, float]], new: tuple[float, float]
) -> None:
    before = [(g, d) for g, d in models]
    after = [*before, (new[0], new[1])]
    assert good_at_equal_closeness(after, (0.0, 1.0)) >= good_at_equal_closeness(before, (0.0, 1.0))
    assert distance_at_equal_good(after, (0.0, 1.0), 1.0) <= distance_at_equal_good(before, (0.0, 1.0), 1.0)
