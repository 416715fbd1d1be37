"""The adversarial terms by hand, by finite differences, and for extreme values."""

import math

import pytest
import torch
from torch.testing import assert_close

from support import reference
from uniapl.functional import (
    adversarial_advantages,
    bradley_terry_loss,
    logistic_losses,
    multiplied_rewards,
    win_probability,
)

POLICY = torch.tensor([[0.0, 2.0, -1.0], [5.0, 5.0, 5.0]], dtype=torch.float64)
EXPERT = torch.tensor([1.0, 5.0], dtype=torch.float64)
KNOWN = torch.ones(2, 3, dtype=torch.bool)


def test_bradley_terry_by_hand() -> None:
    # Differences 0 and ln 3: -ln(1/2) - ln(3/4).
    loss = bradley_terry_loss(
        torch.tensor([1.0, math.log(3.0)], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
    )
    assert math.isclose(float(loss), math.log(2) - math.log(0.75))


def test_bradley_terry_is_binary_cross_entropy_of_the_difference() -> None:
    expert, policy = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    oracle = torch.nn.functional.binary_cross_entropy_with_logits(
        expert - policy, torch.ones(6, dtype=torch.float64), reduction="sum"
    )
    assert_close(bradley_terry_loss(expert, policy), oracle)


def test_bradley_terry_gradient() -> None:
    inputs = (
        torch.randn(4, dtype=torch.float64, requires_grad=True),
        torch.randn(4, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(bradley_terry_loss, inputs)


def test_bradley_terry_stays_finite_when_it_is_certain_and_wrong() -> None:
    expert = torch.tensor([-1e6], requires_grad=True)
    loss = bradley_terry_loss(expert, torch.tensor([1e6]))
    loss.backward()
    assert loss.item() == 2e6
    assert float(expert.grad) == -1.0  # type: ignore[arg-type]


def test_label_smoothing_by_hand_and_where_it_is_least() -> None:
    expert, policy = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    expected = sum(0.9 * math.log1p(math.exp(-m)) + 0.1 * math.log1p(math.exp(m)) for m in (1.0, -2.0))
    assert float(bradley_terry_loss(expert, policy, label_smoothing=0.1)) == pytest.approx(expected)
    margin = torch.tensor([math.log(0.9 / 0.1)], requires_grad=True)
    bradley_terry_loss(margin, torch.zeros(1), label_smoothing=0.1).backward()
    assert margin.grad is not None
    assert float(margin.grad) == pytest.approx(0.0, abs=1e-6)


def test_win_probability_by_hand() -> None:
    expected = [
        [reference.sigmoid(x - e) for x in row]
        for row, e in zip(POLICY.tolist(), EXPERT.tolist(), strict=True)
    ]
    assert_close(win_probability(POLICY, EXPERT), torch.tensor(expected, dtype=torch.float64))
    assert win_probability(EXPERT.unsqueeze(-1), EXPERT).tolist() == [[0.5], [0.5]]


def test_adversarial_credits_by_hand() -> None:
    u = [reference.sigmoid(x - 1.0) for x in (0.0, 2.0, -1.0)]
    logs = [math.log(p) for p in u]
    std = math.sqrt(sum((x - 1 / 3) ** 2 for x in (0, 2, -1)) / 2) + 1e-4
    expected = {
        "win_probability": [p - sum(u) / 3 for p in u],
        "log_sigmoid": [p - sum(logs) / 3 for p in logs],
        "logit": [x - 1 / 3 for x in (0.0, 2.0, -1.0)],
        "standardized": [(x - 1 / 3) / std for x in (0.0, 2.0, -1.0)],
    }
    for credit, row in expected.items():
        got = adversarial_advantages(POLICY, EXPERT, KNOWN, adversarial_credit=credit)  # type: ignore[arg-type]
        assert_close(got[0], torch.tensor(row, dtype=torch.float64))
        assert torch.equal(got[1], torch.zeros(3, dtype=torch.float64)), "equal answers deserve equal credit"


def test_the_default_is_bounded_and_fades() -> None:
    """|B| < 1 for all logits; it shrinks with their differences, unlike a standardised advantage."""
    huge = adversarial_advantages(POLICY * 1e6, EXPERT, KNOWN)
    assert huge.abs().max() <= 1
    close = POLICY * 1e-3
    assert adversarial_advantages(close, EXPERT * 1e-3, KNOWN).abs().max() < 1e-3
    assert adversarial_advantages(close, EXPERT, KNOWN, adversarial_credit="standardized").abs().max() > 0.5


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e9])
def test_unknown_logits_are_never_read(poison: float) -> None:
    known = torch.tensor([[True, True, False], [False, False, False]])
    clean = torch.where(known, POLICY, 0.0)
    poisoned = torch.where(known, POLICY, poison)
    for credit in ("win_probability", "log_sigmoid", "logit", "standardized"):
        got = adversarial_advantages(poisoned, EXPERT, known, adversarial_credit=credit)  # type: ignore[arg-type]
        expected = adversarial_advantages(clean, EXPERT, known, adversarial_credit=credit)  # type: ignore[arg-type]
        assert torch.equal(got, expected)
        assert got[0, 2] == 0


def test_multiplied_rewards_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.8, 0.8, 0.8, 0.0, -1.0]], dtype=torch.float64)
    wins = torch.tensor([[0.9, 0.5, 0.9, 0.2, 0.9, 0.1]], dtype=torch.float64)
    passes = torch.tensor([[True, True, False, False, False, False]])
    once = multiplied_rewards(rewards, wins, passes, exponent=1.0)
    # The third fails, so it keeps at most half; a penalty is not reduced by style.
    assert once[0].tolist() == pytest.approx([0.9, 0.4, 0.4, 0.16, 0.0, -1.0])
    twice = multiplied_rewards(rewards, wins, passes, exponent=2.0)
    assert twice[0].tolist() == pytest.approx([0.81, 0.2, 0.4, 0.032, 0.0, -1.0])
    root = multiplied_rewards(rewards, wins, passes, exponent=0.5)
    assert root[0].tolist() == pytest.approx(
        [math.sqrt(0.9), 0.8 * math.sqrt(0.5), 0.4, 0.8 * math.sqrt(0.2), 0, -1]
    )


def test_a_failing_completion_never_exceeds_an_even_passing_one() -> None:
    wins = torch.linspace(0, 1, 11, dtype=torch.float64).unsqueeze(0)
    ones, none = torch.ones_like(wins), torch.zeros_like(wins, dtype=torch.bool)
    failing = multiplied_rewards(ones, wins, none, exponent=1.0)
    assert failing.max() == 0.5
    passing = multiplied_rewards(ones, wins, ~none, exponent=1.0)
    assert_close(passing, wins)


def test_logistic_losses_by_hand_and_their_gradients() -> None:
    experts = torch.tensor([0.0, math.log(3.0)], dtype=torch.float64, requires_grad=True)
    negatives = torch.tensor([math.log(3.0), -1e4, 0.0], dtype=torch.float64, requires_grad=True)
    expert, negative = logistic_losses(experts, negatives)
    # -ln(1/2) - ln(3/4), and -ln(1/4) - ln(1) - ln(1/2).
    assert float(expert) == pytest.approx(math.log(2) - math.log(0.75))
    assert float(negative) == pytest.approx(math.log(4) + math.log(2))
    (expert + negative).backward()
    # Against the sigmoid: the loss pushes experts up and negatives down.
    assert experts.grad is not None
    assert negatives.grad is not None
    assert experts.grad.tolist() == pytest.approx([-0.5, -0.25])
    assert negatives.grad.tolist() == pytest.approx([0.75, 0.0, 0.5])


def test_logistic_losses_gradcheck() -> None:
    inputs = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (3, 5)]
    assert torch.autograd.gradcheck(lambda a, b: sum(logistic_losses(a, b)), inputs)
