"""Pass rates of prompts, and the probability with which a prompt is drawn, by hand."""

import pytest

from uniapl.data.pass_rates import PassRates
from uniapl.types import Example


def example(*prompt: int) -> Example:
    return Example(
        row=1, prompt="p", prompt_ids=prompt, demonstration=None, demonstration_ids=None, columns={}
    )


def test_a_visit_halves_the_weight_of_earlier_rollouts() -> None:
    rates, prompt = PassRates(), example(5, 6)
    assert (rates.metrics(), rates.never_passed(prompt)) == ({}, False)
    rates.update(prompt, [])
    assert rates.counts == {}, "without a known reward there is no visit"
    rates.update(prompt, [True, False, False, False])
    assert [*rates.counts.values()] == [(1, 3)]
    rates.update(prompt, [True] * 4)
    assert [*rates.counts.values()] == [(4.5, 1.5)]
    rates.update(prompt, [False] * 2)
    assert [*rates.counts.values()] == [(2.25, 2.75)]
    rates.update(example(7), [False])
    assert rates.metrics() == {"prompts/pass_rate": 0.225, "prompts/never_passed": 0.5}
    assert (rates.never_passed(example(7)), rates.never_passed(prompt)) == (True, False)


def test_a_prompt_is_its_token_ids() -> None:
    """A row that moved in the data keeps its rate."""
    rates = PassRates()
    rates.update(example(5, 6), [False])
    moved = example(5, 6)
    assert rates.never_passed(moved)
    assert not rates.never_passed(example(5, 6, 7))
    assert PassRates(rates.counts).never_passed(moved)


@pytest.mark.parametrize(
    ("passed", "probability"),
    [
        ([], 1.0),
        # 1 - (3 / 4) ** 2, 1 - (2 / 4) ** 2 and 1 - (1 / 4) ** 2.
        ([True, True], 7 / 16),
        ([True, False], 12 / 16),
        ([False, False], 15 / 16),
    ],
)
def test_the_probability_that_not_all_pass(passed: list[bool], probability: float) -> None:
    rates = PassRates()
    rates.update(example(5), passed)
    assert rates.probability(example(5), 2) == pytest.approx(probability, abs=1e-15)


@pytest.mark.parametrize(("generations", "limit"), [(2, 0.3056), (8, 0.3670), (64, 0.3899)])
def test_a_prompt_that_always_passes_is_still_drawn(generations: int, limit: float) -> None:
    """1 - ((2 G + 1) / (2 G + 2)) ** G."""
    rates = PassRates()
    seen: list[float] = []
    for _ in range(60):
        rates.update(example(5), [True] * generations)
        seen.append(rates.probability(example(5), generations))
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == pytest.approx(limit, abs=1e-4)
