"""Loss types and ratio levels by hand, against plain Python and finite differences, with NaN off the mask."""

import math
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from support import reference
from uniapl.functional import (
    cispo_loss,
    clip_counts,
    clipped_surrogate,
    divisors,
    k3_kl,
    length_weights,
    objective,
    policy_ratios,
)

CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28}
LOSSES = ("grpo", "grpo-kl", "sequence", "gspo", "cispo", "cispo-sequence")


@pytest.fixture
def x() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    logprobs = -torch.rand(3, 5, dtype=torch.float64) * 3 - 0.01
    shift = torch.tensor(
        [[9.0, 0.6, 0.1, 0.3, 9.0], [9.0, 9.0, -0.6, 0.2, -0.1], [9.0] * 5], dtype=torch.float64
    )
    return {
        "logprobs": logprobs,
        "old": logprobs - shift,
        "ref": logprobs + torch.randn(3, 5, dtype=torch.float64) * 0.5,
        "advantages": torch.tensor([1.5, -0.7, 0.4], dtype=torch.float64),
        "mask": torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0] * 5], dtype=torch.bool),
    }


def compute(name: str, x: dict[str, torch.Tensor], logprobs: torch.Tensor) -> torch.Tensor:
    inputs = (logprobs, x["old"], x["advantages"], x["mask"])
    lengths = length_weights(x["mask"], dtype=torch.float64)
    if name == "grpo-kl":
        return k3_kl(logprobs, x["ref"], x["mask"], weights=lengths)
    level: Any = "token" if name in ("grpo", "cispo") else "sequence"
    if name.startswith("cispo"):
        return cispo_loss(*inputs, cap=1.2, level=level)
    weights = None if name == "sequence" else lengths
    return clipped_surrogate(*inputs, **CLIP, weights=weights, level=level)


def test_by_hand() -> None:
    # Ratios 2 and 1/2 in the first row, 4 in the second; the last token is masked.
    logprobs = torch.tensor([[0.5, 0.25, 0.9], [0.8, 0.9, 0.9]], dtype=torch.float64).log()
    old = torch.tensor([[0.25, 0.5, 0.1], [0.2, 0.1, 0.1]], dtype=torch.float64).log()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    advantages = torch.tensor([3.0, 1.0], dtype=torch.float64)
    inputs = (logprobs, old, advantages, mask)
    # A row's ratio is the geometric mean: sqrt(2 * 1/2) = 1, and 4.
    expected = torch.tensor([[1.0, 1.0, 1.0], [4.0, 1.0, 1.0]], dtype=torch.float64)
    assert_close(policy_ratios(logprobs, old, mask, level="sequence"), expected)
    # Per token 1.28 * 3, 0.5 * 3 and 1.28 * 1; per row the means (1.28 + 0.5) / 2 * 3 and 1.28.
    lengths = length_weights(mask, dtype=torch.float64)
    assert lengths.tolist() == [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]
    assert math.isclose(clipped_surrogate(*inputs, **CLIP), -(1.28 * 3 + 0.5 * 3 + 1.28))
    assert math.isclose(clipped_surrogate(*inputs, **CLIP, weights=lengths), -(0.89 * 3 + 1.28))
    assert math.isclose(clipped_surrogate(*inputs, **CLIP, level="sequence"), -(1 * 3 + 1 * 3 + 1.28))
    # CISPO: - min(ratio, 3) A log p.
    cispo = -(2 * 3 * math.log(0.5) + 0.5 * 3 * math.log(0.25) + 3 * 1 * math.log(0.8))
    assert math.isclose(cispo_loss(*inputs, cap=3.0), cispo)


def test_divisors_by_hand() -> None:
    tokens = {"sft": 7, "rl": 6, "adv": 2, "kl": 9}
    completions = {"sft": 2, "rl": 3, "adv": 1, "kl": 4}
    of: dict[str, dict[str, int]] = {
        "dapo": {"rl": 6, "adv": 2, "kl": 9},
        "bnpo": {"rl": 6, "adv": 2, "kl": 9},
        "cispo": {"rl": 6, "adv": 2, "kl": 9},
        "grpo": {"rl": 3, "adv": 1, "kl": 4},
        "dr_grpo": {"rl": 30, "adv": 10, "kl": 40},
    }
    for loss_type, expected in of.items():
        got = divisors(tokens, completions, loss_type=loss_type, max_completion_length=10)  # type: ignore[arg-type]
        assert got == expected | {"sft": 7, "teacher": expected["kl"], "entropy": 9}


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_equals_plain_python(loss_type: Any, level: Any, x: dict[str, torch.Tensor]) -> None:
    """The mean over the two completions with tokens: the third row is not in the component."""
    weights = length_weights(x["mask"], dtype=torch.float64) if loss_type == "grpo" else None
    inputs = (x["logprobs"], x["old"], x["advantages"], x["mask"])
    found = divisors(
        {"sft": 0, "rl": 6, "adv": 0, "kl": 6},
        {"sft": 0, "rl": 2, "adv": 0, "kl": 2},
        loss_type=loss_type,
        max_completion_length=8,
    )
    loss = clipped_surrogate(*inputs, **CLIP, weights=weights, level=level)
    got = objective({"rl": loss}, {"rl": 1.0}, found)
    completions = [
        (
            [float(x["logprobs"][b, t]) for t in range(5) if x["mask"][b, t]],
            [float(x["old"][b, t]) for t in range(5) if x["mask"][b, t]],
            float(x["advantages"][b]),
        )
        for b in range(2)
    ]
    expected = reference.policy_loss(completions, loss_type, level, 0.2, 0.28, max_length=8)
    assert math.isclose(float(got), expected)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_cispo_equals_plain_python(level: Any, x: dict[str, torch.Tensor]) -> None:
    expected = 0.0
    for b in range(2):
        log_ratios = [float(x["logprobs"][b, t] - x["old"][b, t]) for t in range(5) if x["mask"][b, t]]
        mean = sum(log_ratios) / len(log_ratios)
        chosen = [float(x["logprobs"][b, t]) for t in range(5) if x["mask"][b, t]]
        for logprob, log_ratio in zip(chosen, log_ratios, strict=True):
            ratio = math.exp(log_ratio if level == "token" else mean)
            expected -= min(ratio, 1.2) * float(x["advantages"][b]) * logprob
    name = "cispo" if level == "token" else "cispo-sequence"
    assert math.isclose(float(compute(name, x, x["logprobs"])), expected)


@pytest.mark.parametrize("name", ["grpo", "grpo-kl", "sequence", "gspo"])
def test_gradient_against_finite_differences(name: str, x: dict[str, torch.Tensor]) -> None:
    assert torch.autograd.gradcheck(lambda lp: compute(name, x, lp), x["logprobs"].requires_grad_())


@pytest.mark.parametrize("name", ["cispo", "cispo-sequence"])
def test_cispo_s_ratio_carries_no_gradient_and_no_token_loses_its_own(
    name: str, x: dict[str, torch.Tensor]
) -> None:
    leaf = x["logprobs"].requires_grad_()
    (got,) = torch.autograd.grad(compute(name, x, leaf), leaf)
    ratio = policy_ratios(leaf, x["old"], x["mask"], level="token" if name == "cispo" else "sequence")
    ratio = ratio.detach().clamp(max=1.2)
    assert_close(got, torch.where(x["mask"], -ratio * x["advantages"].unsqueeze(-1), 0.0))
    assert float((ratio[x["mask"]] == 1.2).sum()) >= 1
    assert bool((got[x["mask"]] != 0).all())


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
    poisoned["advantages"] = torch.where(x["mask"].any(-1), x["advantages"], poison)
    leaf = poisoned["logprobs"].requires_grad_()
    poisoned_loss = compute(name, poisoned, leaf)
    poisoned_loss.backward()
    assert torch.equal(poisoned_loss, loss)
    assert leaf.grad is not None
    assert clean.grad is not None
    assert torch.equal(leaf.grad, clean.grad)


def test_clipped_sequences_are_counted_once(x: dict[str, torch.Tensor]) -> None:
    """Mean log-ratios 1/3 (A > 0: over 1.28) and -1/6 (A < 0: not under 0.8)."""
    inputs = (x["logprobs"], x["old"], x["advantages"], x["mask"])
    assert [float(n) for n in clip_counts(*inputs, **CLIP, level="sequence")] == [0.0, 1.0]
    wide: dict[str, Any] = {"clip_low": 0.1, "clip_high": 0.28}
    assert [float(n) for n in clip_counts(*inputs, **wide, level="sequence")] == [1.0, 1.0]
    # Per token: 0.6 and 0.3 of the first row are over log 1.28, -0.6 of the second is under log 0.8.
    assert [float(n) for n in clip_counts(*inputs, **CLIP)] == [1.0, 2.0]


def test_on_policy_a_sequence_ratio_has_the_gradient_of_token_ratios(x: dict[str, torch.Tensor]) -> None:
    leaf = x["logprobs"].requires_grad_()
    inputs = (leaf, leaf.detach(), x["advantages"], x["mask"])
    lengths = length_weights(x["mask"], dtype=torch.float64)
    (token,) = torch.autograd.grad(clipped_surrogate(*inputs, **CLIP, weights=lengths), leaf)
    loss = clipped_surrogate(*inputs, **CLIP, weights=lengths, level="sequence")
    (sequence,) = torch.autograd.grad(loss, leaf)
    assert_close(sequence, token)
