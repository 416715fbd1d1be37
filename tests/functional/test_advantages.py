"""Group-relative advantages by hand, against plain Python, and for groups of equal rewards."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from support import reference
from uniapl.functional import decoupled_advantages, group_advantages


def tensors(groups: list[list[float | None]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards and the mask of known rewards; unknown rewards are NaN, so that using one fails the test."""
    nan = float("nan")
    rewards = torch.tensor([[nan if r is None else r for r in g] for g in groups], dtype=torch.float64)
    return rewards, torch.tensor([[r is not None for r in g] for g in groups])


def test_by_hand() -> None:
    # mean of (1, 0, 0, 1) is 0.5; unbiased variance (4 * 0.25) / 3.
    rewards, known = tensors([[1, 0, 0, 1]])
    assert_close(
        group_advantages(rewards, known), torch.tensor([[0.5, -0.5, -0.5, 0.5]], dtype=torch.float64)
    )
    std = (1 / 3) ** 0.5
    expected = torch.tensor([[0.5, -0.5, -0.5, 0.5]], dtype=torch.float64) / (std + 1e-4)
    assert_close(group_advantages(rewards, known, scale="group"), expected)


def test_unknown_rewards_are_left_out_of_their_group() -> None:
    rewards, known = tensors([[1, None, 0], [None, None, None], [None, 7, None]])
    got = group_advantages(rewards, known)
    assert_close(got, torch.tensor([[0.5, 0, -0.5], [0, 0, 0], [0, 0, 0]], dtype=torch.float64))


@pytest.mark.parametrize("scale", ["none", "group"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e9, -2.7])
@pytest.mark.parametrize("size", [3, 7, 10])
def test_equal_rewards_give_exactly_zero(scale: str, value: float, size: int) -> None:
    # The mean of equal floats is not always that float; dividing the residue by ~0 gave advantages of -2075.
    for dtype in (torch.float32, torch.float64):
        rewards = torch.full((1, size), value, dtype=dtype)
        got = group_advantages(rewards, torch.ones(1, size, dtype=torch.bool), scale=scale)  # type: ignore[arg-type]
        assert torch.equal(got, torch.zeros_like(rewards))


reward = st.one_of(st.none(), st.floats(-100, 100).map(lambda x: round(x, 3)))


@given(
    st.lists(st.lists(reward, min_size=4, max_size=4), min_size=1, max_size=5),
    st.sampled_from(["none", "group"]),
)
def test_equals_plain_python(groups: list[list[float | None]], scale: str) -> None:
    got = group_advantages(*tensors(groups), scale=scale)  # type: ignore[arg-type]
    expected = [reference.group_advantages(group, scale) for group in groups]
    assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=1e-7, rtol=1e-6)


def test_permuting_a_group_permutes_its_advantages() -> None:
    rewards, known = tensors([[0.2, None, 0.9, 0.4]])
    order = torch.tensor([2, 0, 3, 1])
    assert_close(
        group_advantages(rewards[:, order], known[:, order], scale="group"),
        group_advantages(rewards, known, scale="group")[:, order],
    )


@pytest.mark.parametrize("scale", ["none", "group"])
def test_rewards_that_differ_by_rounding_have_no_advantage(scale: Any) -> None:
    """Their differences, divided by a deviation that is rounding too, would be advantages."""
    sums = [0.6 + 0.3 + 0.1, 0.1 + 0.3 + 0.6, 0.1 + 0.6 + 0.3, 0.3 + 0.1 + 0.6]
    assert len(set(sums)) > 1
    for values in (sums, [1e6 * value for value in sums], [0.1 + 0.2 - 0.3, 0.0, 0.0, 0.0]):
        rewards = torch.tensor([values], dtype=torch.float64)
        known = torch.ones_like(rewards, dtype=torch.bool)
        assert group_advantages(rewards, known, scale=scale).tolist() == [[0.0] * 4]
        # An unknown reward is not compared.
        rewards[0, 3], known[0, 3] = 7.0, False
        assert group_advantages(rewards, known, scale=scale).tolist() == [[0.0] * 4]


def test_small_differences_of_rewards_are_kept() -> None:
    rewards = torch.tensor([[1.0, 1.0 + 2e-6]], dtype=torch.float64)
    got = group_advantages(rewards, torch.ones_like(rewards, dtype=torch.bool))
    assert got.tolist()[0] == pytest.approx([-1e-6, 1e-6], rel=1e-6)


def test_batch_divides_by_the_deviation_of_all_known_rewards() -> None:
    # Rewards 1, 0, 3, 3 and an unknown one: mean 7/4, squares 9/16 + 49/16 + 25/16 + 25/16 = 27/4, / 3.
    rewards, known = tensors([[1, 0, None], [3, None, 3]])
    std = (27 / 4 / 3) ** 0.5
    expected = torch.tensor([[0.5, -0.5, 0], [0, 0, 0]], dtype=torch.float64) / (std + 1e-4)
    assert_close(group_advantages(rewards, known, scale="batch"), expected)
    least = torch.tensor([2.0, 0.0], dtype=torch.float64)
    got = group_advantages(rewards, known, scale="batch", min_std=least)
    assert_close(got[0, 0], torch.tensor(0.5 / 2.0001, dtype=torch.float64))
    nothing = torch.zeros_like(known)
    assert torch.equal(group_advantages(rewards, nothing, scale="batch"), torch.zeros(2, 3).double())


@given(st.lists(st.lists(reward, min_size=4, max_size=4), min_size=1, max_size=5))
def test_batch_equals_plain_python(groups: list[list[float | None]]) -> None:
    std = reference.batch_std([r for group in groups for r in group if r is not None])
    centred = [reference.group_advantages(group, "none") for group in groups]
    expected = torch.tensor(centred, dtype=torch.float64) / (std + 1e-4)
    assert_close(group_advantages(*tensors(groups), scale="batch"), expected, atol=1e-7, rtol=1e-6)


def test_decoupled_by_hand() -> None:
    """Two functions; the second, whose values are 1,000 times as large, does not hide the first."""
    first, first_known = tensors([[1, 0], [0, 0]])
    second, second_known = tensors([[0, 0], [3000, 1000]])
    rewards, known = torch.stack([first, second]), torch.stack([first_known, second_known])
    got = decoupled_advantages(rewards, known, torch.tensor([1.0, 0.5], dtype=torch.float64))
    one = 0.5 / (0.5**0.5 + 1e-4)
    other = 0.5 * 1000 / (2_000_000**0.5 + 1e-4)
    std = ((2 * one**2 + 2 * other**2) / 3) ** 0.5
    expected = torch.tensor([[one, -one], [other, -other]], dtype=torch.float64) / (std + 1e-4)
    assert_close(got, expected)


@given(
    st.lists(
        st.lists(st.lists(reward, min_size=3, max_size=3), min_size=2, max_size=2), min_size=1, max_size=3
    )
)
def test_decoupled_equals_plain_python(parts: list[list[list[float | None]]]) -> None:
    weights = [1.0, 0.5, 2.0][: len(parts)]
    both = [tensors(part) for part in parts]
    got = decoupled_advantages(
        torch.stack([values for values, _ in both]),
        torch.stack([known for _, known in both]),
        torch.tensor(weights, dtype=torch.float64),
    )
    expected = torch.tensor(reference.decoupled_advantages(parts, weights), dtype=torch.float64)
    assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_decoupled_rewards_that_are_equal_in_each_group_give_exactly_zero() -> None:
    rewards = torch.tensor([[[0.1] * 3, [0.7] * 3], [[2.0] * 3, [1 / 3] * 3]], dtype=torch.float64)
    weights = torch.ones(2, dtype=torch.float64)
    got = decoupled_advantages(rewards, torch.ones_like(rewards, dtype=torch.bool), weights)
    assert torch.equal(got, torch.zeros(2, 3, dtype=torch.float64))
