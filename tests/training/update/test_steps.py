"""One update of the policy and of the discriminator, held against the formulas term by term."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.testing import assert_close

from support import reference
from support.comparisons import COMPARISONS, sequences
from support.tiny import make_model, random_rows
from uniapl.data.batching import Row, collate
from uniapl.discriminator.bradley_terry import BradleyTerryDiscriminator, Comparison, ScoreModel
from uniapl.models.policy import Policy
from uniapl.training.update.accumulate import accumulate_gradients, clip_gradient, reduce_sums
from uniapl.training.update.batch import MixedBatch
from uniapl.training.update.discriminator_step import discriminator_step
from uniapl.training.update.policy_step import LossSettings, PolicyStep, policy_step

ACCELERATOR = Accelerator(cpu=True)
PAIRS = 6
"""Pairs of COMPARISONS, which are three groups."""


def discriminator(label_smoothing: float = 0.0) -> BradleyTerryDiscriminator:
    module = ScoreModel.copy_of(make_model())
    torch.manual_seed(3)
    with torch.no_grad():
        module.head.weight.normal_()
    return BradleyTerryDiscriminator(
        module=module, pad_id=0, max_tokens=10_000, label_smoothing=label_smoothing
    )


def margins(given: Sequence[Comparison]) -> list[float]:
    logits = discriminator().logits
    return [
        logits(c.sequences[:1])[0] - logits([(c.prompt_ids, ids)])[0] for c in given for ids in c.completions
    ]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("max_tokens", [1, 30, None])
def test_the_discriminator_s_loss_is_the_mean_over_pairs(smoothing: float, max_tokens: int | None) -> None:
    subject = discriminator(smoothing)
    optimizer = torch.optim.SGD(subject.module.parameters(), lr=0.0)
    loss, applied = discriminator_step(
        ACCELERATOR, subject, subject.module, optimizer, COMPARISONS, max_grad_norm=1.0, max_tokens=max_tokens
    )
    found = margins(COMPARISONS)
    assert len(found) == PAIRS
    losses = [(1 - smoothing) * math.log1p(math.exp(-m)) + smoothing * math.log1p(math.exp(m)) for m in found]
    assert loss == pytest.approx(sum(losses) / PAIRS, rel=1e-4)
    assert applied


@pytest.mark.parametrize("clipped", [False, True])
def test_the_discriminator_s_step_is_the_gradient_of_the_mean_over_pairs(clipped: bool) -> None:
    """A head alone has the gradient (1 - sigmoid(margin)) (h(y) - h(y*)), averaged over the pairs."""
    subject = discriminator()
    head = subject.module.head.weight
    hidden = torch.stack(
        [
            subject.module.trunk(torch.tensor([prompt + ids])).last_hidden_state[0, -1]
            for prompt, ids in sequences()
        ]
    ).detach()
    parts = hidden.split([1 + len(c.completions) for c in COMPARISONS])
    gradient = torch.zeros_like(head[0])
    for part in parts:
        for other in part[1:]:
            margin = float((part[0] - other) @ head[0].detach())
            gradient += reference.sigmoid(-margin) * (other - part[0]) / PAIRS
    before = head.detach().clone()
    for name, parameter in subject.module.named_parameters():
        parameter.requires_grad_(name == "head.weight")
    norm = float(gradient.norm())
    limit = norm / 2 if clipped else 2 * norm
    optimizer = torch.optim.SGD([head], lr=0.5)
    discriminator_step(ACCELERATOR, subject, subject.module, optimizer, COMPARISONS, max_grad_norm=limit)
    expected = before[0] - 0.5 * gradient * (0.5 if clipped else 1.0)
    assert_close(head[0].detach(), expected, atol=1e-4, rtol=1e-3)
    assert head.grad is None or not head.grad.any(), "no gradient is left for the next update"


@pytest.mark.parametrize("max_tokens", [1, 30, None])
def test_the_unpaired_step_is_half_of_the_mean_over_each_side(max_tokens: int | None) -> None:
    """Loss and gradient of the head in plain Python, with rollouts of a prompt without a demonstration."""
    given = [
        Comparison(prompt_ids=(5, 6), demonstration_ids=None, completions=((9, 9), (10, 11, 12, 13))),
        Comparison(prompt_ids=(14,), demonstration_ids=(7, 1), completions=((7, 8, 1), (9, 15, 9, 16, 17))),
        Comparison(prompt_ids=(5, 6, 7, 8, 9), demonstration_ids=(7, 8, 1), completions=()),
    ]
    experts = [((14,), (7, 1)), ((5, 6, 7, 8, 9), (7, 8, 1))]
    negatives = [
        ((5, 6), (9, 9)),
        ((5, 6), (10, 11, 12, 13)),
        ((14,), (7, 8, 1)),
        ((14,), (9, 15, 9, 16, 17)),
    ]
    subject = replace(discriminator(), unpaired=True)
    assert subject.counts(given) == {"expert": 2, "negative": 4}
    head = subject.module.head.weight
    loss, gradient = 0.0, torch.zeros_like(head[0])
    for items, sign in ((experts, 1.0), (negatives, -1.0)):
        for prompt, ids in items:
            hidden = subject.module.trunk(torch.tensor([prompt + ids])).last_hidden_state[0, -1].detach()
            logit = float(hidden @ head[0].detach())
            loss += 0.5 / len(items) * math.log1p(math.exp(-sign * logit))
            gradient -= 0.5 / len(items) * sign * reference.sigmoid(-sign * logit) * hidden
    before = head.detach().clone()
    optimizer = torch.optim.SGD([head], lr=0.5)
    for name, parameter in subject.module.named_parameters():
        parameter.requires_grad_(name == "head.weight")
    found, applied = discriminator_step(
        ACCELERATOR, subject, subject.module, optimizer, given, max_grad_norm=1e9, max_tokens=max_tokens
    )
    assert applied
    assert found == pytest.approx(loss, rel=1e-4)
    assert_close(head[0].detach(), before[0] - 0.5 * gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("max_tokens", [1, 12, 25, 40, 41, 42, 1000])
def test_a_comparison_is_split_into_parts_that_fit(max_tokens: int) -> None:
    whole = Comparison(prompt_ids=(5,), demonstration_ids=(6, 1), completions=((7, 8, 9),) * 9)
    parts = whole.split(max_tokens)
    assert [ids for part in parts for ids in part.completions] == list(whole.completions)
    assert {part.demonstration_ids for part in parts} == {(6, 1)}
    for part in parts:
        assert len(part.completions) == 1 or len(part.sequences) * part.width <= max_tokens
    assert len(parts) == (9 if max_tokens < 8 + 4 else math.ceil(9 / (max_tokens // 4 - 1)))


def test_an_infinite_gradient_of_a_finite_loss_is_not_applied() -> None:
    subject = discriminator()
    head = subject.module.head.weight
    head.register_hook(lambda gradient: gradient * math.inf)
    before = head.detach().clone()
    optimizer: Any = torch.optim.SGD(subject.module.parameters(), lr=1.0)
    loss, applied = discriminator_step(
        ACCELERATOR, subject, subject.module, optimizer, COMPARISONS, max_grad_norm=1.0
    )
    assert (math.isfinite(loss), applied) == (True, False)
    assert torch.equal(head, before)
    policy = Policy(make_model())
    parameter = next(policy.parameters())
    parameter.register_hook(lambda gradient: gradient * math.inf)
    optimizer = Kept(policy.parameters(), lr=1.0)
    rows = random_rows()
    result = policy_step(
        ACCELERATOR,
        policy,
        optimizer,
        MixedBatch(rows=rows, micro_batches=[collate(rows, pad_id=0)], weights={**WEIGHTS, "kl": 0.0}),
        LossSettings(**SETTINGS),
    )
    assert (math.isfinite(result.sums["loss"]), result.applied, optimizer.steps) == (True, False, 0)


def test_one_process_s_gradient_is_not_scaled_and_its_sums_and_maxima_are_kept() -> None:
    module = nn.Linear(2, 1, bias=False)
    inputs = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])]
    accumulate_gradients(ACCELERATOR, module, lambda x: module(x).sum(), inputs)
    assert module.weight.grad is not None
    assert module.weight.grad.tolist() == [[4.0, 1.0]]
    assert clip_gradient(ACCELERATOR, module, 1.0) == pytest.approx(17**0.5)
    assert_close(module.weight.grad, torch.tensor([[4.0, 1.0]]) / 17**0.5, atol=1e-5, rtol=1e-5)
    measured = [
        {"a": torch.tensor(1.0), "b_max": torch.tensor(5)},
        {"a": torch.tensor(2.5), "b_max": torch.tensor(3)},
    ]
    assert reduce_sums(ACCELERATOR, measured) == {"a": 3.5, "b_max": 5.0}


WEIGHTS = {"sft": 0.3, "rl": 0.7, "adv": 2.0, "kl": 0.05}
SETTINGS: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.3}


class Kept(torch.optim.SGD):
    """Keeps the gradient of its step and changes nothing; the number of steps is counted."""

    steps = 0
    gradient = torch.zeros(0)

    def step(self, closure: Any = None) -> None:
        self.steps += 1
        self.gradient = torch.cat(
            [
                (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                for group in self.param_groups
                for p in group["params"]
            ]
        )


def logprobs_of(model: Any, row: Row, temperature: float) -> tuple[list[float], list[float]]:
    """Log-probability of each completion token, and the entropy at its position."""
    ids = [*row.prompt_ids, *row.completion_ids]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().tolist()
    begin = len(row.prompt_ids)
    steps = [logits[position - 1] for position in range(begin, len(ids))]
    return (
        [reference.log_softmax(x, temperature)[t] for x, t in zip(steps, row.completion_ids, strict=True)],
        [reference.entropy(x, temperature) for x in steps],
    )


def updated(
    rows: Sequence[Row], weights: dict[str, float] = WEIGHTS, *, old: Any = None, **settings: Any
) -> tuple[PolicyStep, Kept]:
    policy = Policy(make_model(scale=3.0))
    optimizer = Kept(policy.parameters(), lr=1.0)
    halves = [rows[::2], rows[1::2]]
    result = policy_step(
        ACCELERATOR,
        policy,
        optimizer,
        MixedBatch(
            rows=rows, micro_batches=[collate(half, pad_id=0) for half in halves if half], weights=weights
        ),
        LossSettings(**{**SETTINGS, **settings}),
        old,
    )
    return result, optimizer


def test_every_sum_of_a_step_by_hand() -> None:
    """Also of rollouts without a reward or a logit: the KL and the rollout metrics count all of them."""
    rows = random_rows(seed=2, count=12)
    assert any("rl" not in row.components and "kl" in row.components for row in rows)
    assert any("adv" not in row.components and "kl" in row.components for row in rows)
    result, _ = updated(rows, token_weight="phi", importance_cap=1.5)
    policy = make_model(scale=3.0)
    names = (
        "sft",
        "nll",
        "rl",
        "adv",
        "kl",
        "rollout_tokens",
        "entropy",
        "sampling_difference",
        "importance",
    )
    expected: dict[str, float] = dict.fromkeys(names, 0.0)
    largest = 0.0
    for row in rows:
        ours, entropies = logprobs_of(policy, row, row.temperature)
        if "sft" in row.components:
            mask = [[True] * len(ours)]
            expected["sft"] += reference.sft([ours], mask, "phi")
            expected["nll"] += reference.sft([ours], mask, "none")
            continue
        sampling, theirs = row.sampling_logprobs or (), list(row.ref_logprobs or ())
        expected["kl"] += reference.k3([ours], [theirs], [[True] * len(ours)])
        expected["rollout_tokens"] += len(ours)
        expected["entropy"] += sum(entropies)
        differences = [abs(x - y) for x, y in zip(ours, sampling, strict=True)]
        expected["sampling_difference"] += sum(differences)
        largest = max(largest, *differences)
        importance = [reference.importance(x, y, 1.5) for x, y in zip(ours, sampling, strict=True)]
        expected["importance"] += sum(importance)
        # On-policy every ratio is 1.
        if "rl" in row.components:
            expected["rl"] -= row.advantage * sum(importance)
        if "adv" in row.components:
            expected["adv"] -= row.adversarial_advantage * sum(importance)
    counts = {
        name: sum(len(row.completion_ids) for row in rows if name in row.components) for name in WEIGHTS
    }
    loss = sum(WEIGHTS[name] * expected[name] / counts[name] for name in WEIGHTS)
    for name, value in {**expected, "loss": loss, "sampling_difference_max": largest}.items():
        assert result.sums[name] == pytest.approx(value, rel=1e-3, abs=1e-3), name
    assert result.applied


def test_off_policy_ratios_are_clipped_at_their_own_bounds() -> None:
    """The bounds are [0.8, 1.3]; ratios of 1.28 and 0.78 would be treated otherwise by [0.7, 1.2]."""
    row: dict[str, Any] = {
        "prompt_ids": (5, 6),
        "completion_ids": (7, 8, 9),
        "components": frozenset({"rl", "adv", "kl"}),
        "sampling_logprobs": (-1.0,) * 3,
    }
    rows = [Row(**row, advantage=2.0, adversarial_advantage=-1.0)]
    (current,) = updated(rows)[0].old_logprobs
    for shift, rl, adv, low, high in (
        (-0.4, -2.0 * 1.3 * 3, math.exp(0.4) * 3, 0, 3),
        (-0.25, -2.0 * math.exp(0.25) * 3, math.exp(0.25) * 3, 0, 0),
        (0.4, -2.0 * math.exp(-0.4) * 3, 0.8 * 3, 0, 0),
        (0.25, -2.0 * math.exp(-0.25) * 3, 0.8 * 3, 0, 0),
    ):
        result, _ = updated(rows, old=[current + shift])
        assert result.sums["rl"] == pytest.approx(rl, rel=1e-4)
        assert result.sums["adv"] == pytest.approx(adv, rel=1e-4)
        assert (result.sums["clip_low"], result.sums["clip_high"]) == (low, high)
        assert_close(result.old_logprobs[0], current + shift)
    negative = [Row(**row, advantage=-2.0)]
    for shift in (0.4, 0.25):
        result, _ = updated(negative, old=[current + shift])
        assert result.sums["rl"] == pytest.approx(2.0 * 0.8 * 3, rel=1e-4)
        assert (result.sums["clip_low"], result.sums["clip_high"]) == (3, 0)


def test_the_gradient_is_clipped_and_its_norm_is_from_before() -> None:
    rows = random_rows(seed=2)
    whole, kept = updated(rows)
    clipped, kept_too = updated(rows, max_grad_norm=0.25 * whole.grad_norm)
    assert whole.grad_norm == pytest.approx(float(kept.gradient.norm()), rel=1e-5)
    assert clipped.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
    assert_close(kept_too.gradient, 0.25 * kept.gradient, atol=1e-6, rtol=1e-3)


def test_without_an_active_component_the_optimizer_does_not_move() -> None:
    rows = [row for row in random_rows(seed=2) if "sft" not in row.components]
    for weights, steps in (
        ({"sft": 1.0, "rl": 0.0, "adv": 0.0, "kl": 0.0}, 0),
        ({"sft": 1.0, "rl": 0.5, "adv": 0.0, "kl": 0.0}, 1),
        ({"sft": 0.0, "rl": 0.0, "adv": 0.0, "kl": 0.1}, 1),
    ):
        result, optimizer = updated(rows, weights)
        assert (optimizer.steps, result.applied) == (steps, True)
        assert ("kl" in result.sums) == bool(weights["kl"])


def test_counts_are_of_all_rows_and_completion_tokens() -> None:
    rows = random_rows(seed=2)
    batch = MixedBatch(rows=rows, micro_batches=[collate(rows[:1], pad_id=0)], weights=WEIGHTS)
    assert batch.completion_tokens == sum(len(row.completion_ids) for row in rows)
    assert batch.num_tokens == batch.completion_tokens + sum(len(row.prompt_ids) for row in rows)
    assert batch.counts["kl"] == sum(len(r.completion_ids) for r in rows if r.sampling_logprobs is not None)
    assert batch.counts["sft"] + batch.counts["kl"] == batch.completion_tokens
