"""The losses by hand, against plain Python, by finite differences, with NaN outside the mask; `objective`."""

import math
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from support import reference
from uniapl.functional import (
    clip_counts,
    clipped_surrogate,
    importance_weights,
    k3_kl,
    objective,
    sft_loss,
)

B, T = 3, 5
CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28}
LOSSES = ("sft", "sft_is", "sft_phi", "sft_luffy", "surrogate", "weighted", "kl")


@pytest.fixture
def x() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    logprobs = -torch.rand(B, T, dtype=torch.float64) * 3 - 0.01
    return {
        "logprobs": logprobs,
        # Row 0 (A > 0) has a token over the upper clip, row 1 (A < 0) one under the lower.
        "old": logprobs
        + torch.tensor(
            [[0.0, -0.6, 0.1, 0.3, 0.0], [0.0, 0.0, 0.6, -0.5, 0.1], [0.0] * 5], dtype=torch.float64
        ),
        "ref": logprobs + torch.randn(B, T, dtype=torch.float64) * 0.5,
        # Of the tokens under the mask one weight is over the cap of 2, others are above and below 1.
        "sampling": logprobs
        - torch.tensor(
            [[0.0, 0.5, 0.2, -0.4, 0.0], [0.0, 0.0, 1.7, -0.2, 0.3], [0.0] * 5], dtype=torch.float64
        ),
        "advantages": torch.tensor([1.5, -0.7, 0.4], dtype=torch.float64),
        "mask": torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool),
    }


def compute(name: str, x: dict[str, torch.Tensor], logprobs: torch.Tensor) -> torch.Tensor:
    if name == "surrogate":
        return clipped_surrogate(logprobs, x["old"], x["advantages"], x["mask"], **CLIP)
    if name == "weighted":
        weights = importance_weights(x["old"], x["sampling"], x["mask"], cap=2.0)
        return clipped_surrogate(logprobs, x["old"], x["advantages"], x["mask"], weights=weights, **CLIP)
    if name == "kl":
        return k3_kl(logprobs, x["ref"], x["mask"])
    weight = name.removeprefix("sft").removeprefix("_") or "none"
    return sft_loss(logprobs, x["mask"], token_weight=weight)  # type: ignore[arg-type]


def test_by_hand() -> None:
    # p = 1/2 and 1/4; the third token is masked out.
    logprobs = torch.tensor([[0.5, 0.25, 0.9]], dtype=torch.float64).log()
    mask = torch.tensor([[True, True, False]])
    log2 = math.log(2)
    for weight, expected in {
        "none": log2 + 2 * log2,
        "is": 0.5 * log2 + 0.25 * 2 * log2,
        "phi": 0.25 * log2 + 0.1875 * 2 * log2,
        "luffy": 0.5 / 0.6 * log2 + 0.25 / 0.35 * 2 * log2,
    }.items():
        assert math.isclose(float(sft_loss(logprobs, mask, token_weight=weight)), expected)  # type: ignore[arg-type]
    # Ratios 2 (A > 0: clipped to 1.28) and 1/2 (A > 0: not clipped): -(1.28 + 0.5) * A.
    old = torch.tensor([[0.25, 0.5, 0.1]], dtype=torch.float64).log()
    one = torch.ones(1, dtype=torch.float64)
    assert math.isclose(float(clipped_surrogate(logprobs, old, 3 * one, mask, **CLIP)), -(1.28 + 0.5) * 3)
    # The same with A < 0: 2 is not clipped, 1/2 is clipped to 0.8: (2 + 0.8) * |A|.
    assert math.isclose(float(clipped_surrogate(logprobs, old, -3 * one, mask, **CLIP)), (2 + 0.8) * 3)
    # k3: r = 1/2 -> 0.5 - 1 + ln 2; r = 2 -> 2 - 1 - ln 2.
    assert math.isclose(float(k3_kl(logprobs, old, mask)), 0.5 - 1 + log2 + 2 - 1 - log2)


def test_equal_plain_python(x: dict[str, torch.Tensor]) -> None:
    lists = {name: value.tolist() for name, value in x.items()}
    for weight in ("none", "is", "phi", "luffy"):
        got = float(sft_loss(x["logprobs"], x["mask"], token_weight=weight))  # type: ignore[arg-type]
        assert math.isclose(got, reference.sft(lists["logprobs"], lists["mask"], weight))
    expected = reference.surrogate(
        lists["logprobs"], lists["old"], lists["advantages"], lists["mask"], 0.2, 0.28
    )
    assert math.isclose(float(compute("surrogate", x, x["logprobs"])), expected)
    weights = [
        [reference.importance(old, sampling, 2.0) for old, sampling in zip(*rows, strict=True)]
        for rows in zip(lists["old"], lists["sampling"], strict=True)
    ]
    expected = reference.surrogate(
        lists["logprobs"], lists["old"], lists["advantages"], lists["mask"], 0.2, 0.28, weights
    )
    assert math.isclose(float(compute("weighted", x, x["logprobs"])), expected)
    assert math.isclose(
        float(compute("kl", x, x["logprobs"])), reference.k3(lists["logprobs"], lists["ref"], lists["mask"])
    )


@pytest.mark.parametrize("name", ["sft", "surrogate", "weighted", "kl"])
def test_gradient_against_finite_differences(name: str, x: dict[str, torch.Tensor]) -> None:
    assert torch.autograd.gradcheck(lambda lp: compute(name, x, lp), x["logprobs"].requires_grad_())


@pytest.mark.parametrize(("name", "weight"), [("sft_is", "is"), ("sft_phi", "phi"), ("sft_luffy", "luffy")])
def test_token_weights_carry_no_gradient(name: str, weight: str, x: dict[str, torch.Tensor]) -> None:
    logprobs = x["logprobs"].requires_grad_()
    (got,) = torch.autograd.grad(compute(name, x, logprobs), logprobs)
    p = logprobs.detach().exp()
    w = {"is": p, "phi": p * (1 - p), "luffy": p / (p + 0.1)}[weight]
    assert_close(got, torch.where(x["mask"], -w, 0.0))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf"), 1e9])
def test_masked_positions_cannot_be_felt(name: str, poison: float, x: dict[str, torch.Tensor]) -> None:
    clean = x["logprobs"].clone().requires_grad_()
    loss = compute(name, x, clean)
    loss.backward()
    poisoned = {
        key: value if key in ("advantages", "mask") else torch.where(x["mask"], value, poison)
        for key, value in x.items()
    }
    # A row that no mask selects may have any advantage.
    poisoned["advantages"] = torch.where(x["mask"].any(-1), x["advantages"], poison)
    leaf = poisoned["logprobs"].requires_grad_()
    poisoned_loss = compute(name, poisoned, leaf)
    poisoned_loss.backward()
    assert torch.equal(poisoned_loss, loss)
    assert leaf.grad is not None
    assert clean.grad is not None
    assert torch.equal(leaf.grad, clean.grad)


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_loss_of_the_selected_tokens_alone(name: str, x: dict[str, torch.Tensor]) -> None:
    """The selected tokens, each as a separate row without padding, give the same sum."""
    rows, columns = x["mask"].nonzero(as_tuple=True)
    alone = {key: x[key][rows, columns].unsqueeze(-1) for key in ("logprobs", "old", "ref", "sampling")}
    alone["advantages"] = x["advantages"][rows]
    alone["mask"] = torch.ones(len(rows), 1, dtype=torch.bool)
    assert_close(compute(name, alone, alone["logprobs"]), compute(name, x, x["logprobs"]))


def test_importance_weights_by_hand() -> None:
    # Four times as likely (capped), half as likely, and a demonstration's token, which no sampler has seen.
    old = torch.tensor([[0.8, 0.1, 0.5]]).log().requires_grad_()
    sampling = torch.tensor([[0.2, 0.2, 1.0]]).log()
    weights = importance_weights(old, sampling, torch.tensor([[True, True, False]]), cap=2.0)
    assert_close(weights, torch.tensor([[2.0, 0.5, 1.0]]))
    assert not weights.requires_grad


def test_on_policy_gradient_is_reinforce(x: dict[str, torch.Tensor]) -> None:
    logprobs = x["logprobs"].requires_grad_()
    surrogate = clipped_surrogate(logprobs, logprobs.detach(), x["advantages"], x["mask"], **CLIP)
    (got,) = torch.autograd.grad(surrogate, logprobs)
    reinforce = -(torch.where(x["mask"], logprobs, 0.0) * x["advantages"].unsqueeze(-1)).sum()
    (expected,) = torch.autograd.grad(reinforce, logprobs)
    assert_close(got, expected)


def test_clip_counts_are_the_tokens_without_gradient(x: dict[str, torch.Tensor]) -> None:
    logprobs = x["logprobs"].requires_grad_()
    loss = compute("surrogate", x, logprobs)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    low, high = clip_counts(logprobs, x["old"], x["advantages"], x["mask"], **CLIP)
    assert float(low) > 0
    assert float(high) > 0
    assert float(low + high) == float((x["mask"] & (gradient == 0)).sum())


def test_objective_by_hand() -> None:
    sums = {
        "sft": torch.tensor(6.0),
        "rl": torch.tensor(-2.0),
        "adv": torch.tensor(1.0),
        "kl": torch.tensor(8.0),
    }
    weights = {"sft": 0.25, "rl": 0.75, "adv": 0.5, "kl": 0.1}
    counts = {"sft": 3, "rl": 4, "adv": 2, "kl": 4}
    # 0.25 * 6/3 + 0.75 * -2/4 + 0.5 * 1/2 + 0.1 * 8/4
    assert_close(objective(sums, weights, counts), torch.tensor(0.5 - 0.375 + 0.25 + 0.2))


def test_objective_does_not_let_one_component_rescale_another() -> None:
    """Ten times as many demonstration tokens with the same mean do not change any gradient."""
    logprob = {name: torch.tensor(-1.0, requires_grad=True) for name in ("sft", "rl")}

    def gradients(copies: int) -> list[torch.Tensor]:
        sums = {"sft": logprob["sft"] * -1.0 * copies, "rl": logprob["rl"] * -4.0}
        loss = objective(sums, {"sft": 0.5, "rl": 0.5}, {"sft": copies, "rl": 4})
        return list(torch.autograd.grad(loss, [logprob["sft"], logprob["rl"]]))

    for got, expected in zip(gradients(10), gradients(1), strict=True):
        assert_close(got, expected)


def test_objective_without_tokens_is_a_differentiable_zero() -> None:
    leaf = torch.tensor([3.0], requires_grad=True)
    loss = objective({"sft": leaf.sum()}, {"sft": 1.0}, {"sft": 0})
    loss.backward()
    assert loss.item() == 0.0
    assert leaf.grad is not None
    assert float(leaf.grad) == 0.0


def test_objective_ignores_an_infinite_component_of_weight_zero() -> None:
    leaf = torch.tensor([0.0], requires_grad=True)
    sums = {"sft": (leaf - 1).sum(), "rl": leaf.log().sum()}
    loss = objective(sums, {"sft": 1.0, "rl": 0.0}, {"sft": 1, "rl": 1})
    loss.backward()
    assert loss.item() == -1.0
    assert leaf.grad is not None
    assert float(leaf.grad) == 1.0


@pytest.mark.parametrize(
    ("weights", "counts", "message"),
    [({}, {"sft": 1}, "weight"), ({"sft": 1.0}, {}, "count"), ({"sft": 1.0}, {"sft": -1}, "negative")],
)
def test_objective_refuses_what_it_cannot_weigh(
    weights: dict[str, float], counts: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        objective({"sft": torch.tensor(1.0)}, weights, counts)


def test_a_column_of_advantages_is_refused_instead_of_broadcast(x: dict[str, torch.Tensor]) -> None:
    with pytest.raises(Exception, match=r"(?i)type-check|violat"):
        clipped_surrogate(x["logprobs"], x["old"], x["advantages"].unsqueeze(-1), x["mask"], **CLIP)
