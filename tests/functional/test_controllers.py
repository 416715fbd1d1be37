"""The controllers of lambda by hand, and on a model of the policy that reacts to lambda."""

import math

import pytest

from uniapl.functional import Multiplier, dual_ascent, expert_gap, pid

WIDE = (1e-6, 1e6)


def test_expert_gap_by_hand() -> None:
    assert [expert_gap(u) for u in (0.5, 0.3, 0.0, 0.7)] == pytest.approx([0.0, 0.2, 0.5, 0.0])


def test_dual_ascent_by_hand() -> None:
    start = Multiplier(value=2.0)
    assert dual_ascent(start, 0.3, learning_rate=0.5, bounds=WIDE).value == pytest.approx(2 * math.exp(0.15))
    assert dual_ascent(start, -0.1, learning_rate=0.5, bounds=WIDE).value == pytest.approx(
        2 * math.exp(-0.05)
    )
    assert dual_ascent(start, 0.3, learning_rate=9.0, bounds=(0.1, 5.0)).value == 5.0
    assert dual_ascent(start, -0.3, learning_rate=99.0, bounds=(0.1, 5.0)).value == 0.1


def test_pid_by_hand() -> None:
    """Gains 10, 2, 4 and decay 0.5, violations 0.2 and then -0.4, from lambda 1."""
    settings = {"gains": (10.0, 2.0, 4.0), "bounds": WIDE, "decay": 0.5}
    first = pid(Multiplier(value=1.0), 0.2, **settings)
    assert (first.average, first.integral) == pytest.approx((0.1, 1.4))
    assert first.value == pytest.approx(10 * 0.1 + 1.4), "nothing was there to rise from"
    second = pid(first, -0.4, **settings)
    assert (second.average, second.integral) == pytest.approx((-0.15, 0.6))
    assert second.value == pytest.approx(WIDE[0]), "10 * -0.15 + 0.6 is below"
    falling = pid(first, 0.0, **settings)
    assert falling.value == pytest.approx(10 * 0.05 + 1.4), "a falling average has no D"
    third = pid(first, 0.4, **settings)
    assert third.value == pytest.approx(10 * 0.25 + 2.2 + 4 * 0.15)


def test_the_integral_does_not_wind_up() -> None:
    multiplier = Multiplier(value=1.0)
    for _ in range(1000):
        multiplier = pid(multiplier, 0.4, gains=(0.0, 1.0, 0.0), bounds=(0.1, 3.0))
    assert multiplier.value == 3.0
    assert pid(multiplier, -0.4, gains=(0.0, 1.0, 0.0), bounds=(0.1, 3.0)).value == pytest.approx(2.6)
    for _ in range(1000):
        multiplier = pid(multiplier, -0.1, gains=(0.0, 1.0, 0.0), bounds=(0.1, 3.0))
    assert (multiplier.integral, multiplier.value) == (0.0, 0.1)


@pytest.mark.parametrize("rule", ["dual", "pid"])
@pytest.mark.parametrize("epsilon", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("start", [0.1, 2.0, 15.0])
def test_a_policy_that_answers_is_brought_to_the_constraint(rule: str, epsilon: float, start: float) -> None:
    """The gap of the modelled policy moves slowly to 0.5 / (1 + lambda)."""
    multiplier, gap, bounds = Multiplier(value=start), 0.4, (0.05, 20.0)
    for _ in range(6000):
        gap += 0.1 * (0.5 / (1 + multiplier.value) - gap)
        if rule == "dual":
            multiplier = dual_ascent(multiplier, gap - epsilon, learning_rate=0.5, bounds=bounds)
        else:
            multiplier = pid(multiplier, gap - epsilon, gains=(10.0, 0.5, 0.0), bounds=bounds)
    assert gap == pytest.approx(epsilon, rel=0.01)
    assert multiplier.value == pytest.approx(0.5 / epsilon - 1, rel=0.02)
