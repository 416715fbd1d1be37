"""Trajectories in a step: given tokens are context, and every component is that of the turns one by one."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from properties.test_step_invariance import LOSSES, METHODS, WEIGHTS, assert_same, off_policy, step
from support.tiny import make_model, paired_rows
from uniapl.data.batching import Row, chosen_rows, collate, halves, micro_batches
from uniapl.models import policy as policy_module
from uniapl.models.policy import Policy
from uniapl.types import Given

RESULT = (60, 61, 62, 63)
"""Tokens that occur in given ranges only."""
FAMILIES = ["qwen3", "mistral_sliding", "gemma2_softcap"]


def given_rows() -> list[Row]:
    """`paired_rows`, of which most have one to three results of tools between their tokens.

    The sampling log-probabilities are near the model's, so that some ratios are clipped and others are not.
    """

    def with_results(row: Row, number: int) -> Row:
        written = tuple(token % 58 + 2 for token in row.completion_ids)
        places = [n for n in range(1, len(written)) if (n + number) % 2 == 0][: (number + 2) % 4]
        ids: tuple[int, ...] = ()
        given: Given = ()
        for place, token in enumerate(written):
            if place in places:
                result = RESULT[: 1 + (place + number) % 4]
                given = (*given, (len(ids), len(ids) + len(result)))
                ids += result
            ids += (token,)
        chosen = row.chosen and with_results(row.chosen, len(row.chosen.completion_ids) - 1)
        prompt = tuple(token % 58 + 2 for token in row.prompt_ids)
        return replace(row, prompt_ids=prompt, completion_ids=ids, given=given, chosen=chosen)

    rows = [with_results(row, number) for number, row in enumerate(paired_rows())]
    model = make_model().double()
    for number, row in enumerate(rows):
        if row.sampling_logprobs is not None:
            with torch.no_grad():
                logprobs = read(model, row).logprobs.tolist()
            shift = [0.35 * (-1) ** (number + place) for place in range(len(logprobs))]
            sampled = tuple(p - s for p, s in zip(logprobs, shift, strict=True))
            rows[number] = replace(row, sampling_logprobs=sampled)
    return rows


class Turns(NamedTuple):
    """What a model computes for the tokens that the policy or the expert wrote."""

    logprobs: Tensor
    """[N]."""
    distributions: Tensor
    """[N, V]: log-probabilities of all tokens."""


def read(model: Any, row: Row) -> Turns:
    """Turn by turn: each turn by itself, after all tokens before it, without padding and masks."""
    logprobs: list[Tensor] = []
    distributions: list[Tensor] = []
    for written, places in groupby(range(len(row.completion_ids)), lambda n: row.tokens.is_written[n]):
        turn = [*places]
        if not written:
            continue
        context = row.prompt_ids + row.completion_ids[: turn[0]]
        own = [row.completion_ids[place] for place in turn]
        logits = model(torch.tensor([[*context, *own]])).logits[0, len(context) - 1 : -1]
        every = (logits / row.temperature).log_softmax(-1)
        distributions += every.unbind()
        logprobs += [one[token] for one, token in zip(every, own, strict=True)]
    return Turns(torch.stack(logprobs), torch.stack(distributions))


def surrogate(own: Tensor, old: Tensor, advantage: float, options: dict[str, Any]) -> list[Tensor]:
    """The terms of a completion: one for each token."""
    log_ratio = own - old
    if options.get("importance_sampling_level") == "sequence":
        log_ratio = log_ratio.mean().expand_as(own)
    ratio = log_ratio.exp()
    if options.get("loss_type") == "cispo":
        return [-min(r.item(), 0.28) * advantage * p for r, p in zip(ratio, own, strict=True)]
    clipped = ratio.clamp(0.8, 1.28)
    return [-torch.minimum(r * advantage, c * advantage) for r, c in zip(ratio, clipped, strict=True)]


def reverse_kl(own: Turns, old: Tensor, teacher: Turns, top_k: int) -> list[Tensor]:
    if not top_k:
        ratio, difference = (own.logprobs - old).exp(), own.logprobs.detach() - teacher.logprobs
        return [r * d for r, d in zip(ratio, difference, strict=True)]
    terms: list[Tensor] = []
    for mine, theirs in zip(own.distributions, teacher.distributions, strict=True):
        likely = theirs.topk(top_k).indices
        p, q = (torch.cat([x[likely], (1 - x[likely].exp().sum()).log().view(1)]) for x in (mine, theirs))
        terms.append((p.exp() * (p - q)).sum())
    return terms


def plain_loss(rows: Sequence[Row], model: Any, weights: dict[str, float], options: dict[str, Any]) -> Tensor:
    """The objective as it is written: the terms of each trajectory, their sum, one division, the weights."""
    terms: dict[str, list[list[Tensor]]] = {name: [] for name in (*WEIGHTS, "teacher", "entropy")}
    pairs: list[Tensor] = []
    other = make_model(seed=3).double()

    def reward(row: Row, logprobs: Tensor) -> Tensor:
        assert row.ref_logprobs is not None
        return 0.3 * (logprobs - torch.tensor(row.ref_logprobs).double()).sum()

    for row in rows:
        own = read(model, row)
        if row.chosen is not None:
            margin = reward(row.chosen, read(model, row.chosen).logprobs) - reward(row, own.logprobs)
            pairs.append((1 + (-margin).exp()).log())
        if "sft" in row.components:
            p = own.logprobs.detach().exp()
            factor = p * (1 - p) if options.get("token_weight") == "phi" else torch.ones_like(p)
            terms["sft"].append([*(-factor * own.logprobs)])
        if "kl" not in row.components:
            continue
        old = torch.tensor(row.sampling_logprobs).double()
        if "rl" in row.components:
            terms["rl"].append(surrogate(own.logprobs, old, row.advantage, options))
        if "adv" in row.components:
            terms["adv"].append(surrogate(own.logprobs, old, row.adversarial_advantage, options))
        gap = torch.tensor(row.ref_logprobs).double() - own.logprobs
        terms["kl"].append([*(gap.exp() - 1 - gap)])
        terms["entropy"].append([*-(own.distributions.exp() * own.distributions).sum(-1)])
        with torch.no_grad():
            teacher = read(other, row)
        terms["teacher"].append(reverse_kl(own, old, teacher, options.get("top_k", 0)))
    loss = weights.get("pref", 0.0) * sum(pairs) / len(pairs)
    for name, completions in terms.items():
        flat = [term for completion in completions for term in completion]
        kind = options.get("loss_type") if name not in ("sft", "entropy") else None
        if kind == "grpo":
            mean = sum(sum(c) / len(c) for c in completions) / len(completions)
        elif kind == "dr_grpo":
            mean = sum(flat) / (len(completions) * options["max_completion_length"])
        else:
            mean = sum(flat) / len(flat)
        loss = loss + weights.get(name, 0.0) * mean
    assert isinstance(loss, Tensor)
    return loss


def of_method(method: str) -> dict[str, Any]:
    weights, token_weight = METHODS[method]
    return {"weights": weights, "token_weight": token_weight}


EVERY: dict[str, Any] = {"weights": WEIGHTS | {"teacher": 0.6, "pref": 0.4, "entropy": -0.2}}
SETTINGS: dict[str, dict[str, Any]] = {
    **{method: of_method(method) for method in METHODS},
    **{f"{loss} loss": {"token_weight": "none", **EVERY, **options} for loss, options in LOSSES.items()},
    "every component": {"token_weight": "phi", **EVERY},
    "top-k teacher": {"token_weight": "none", **EVERY, "top_k": 3, "loss_type": "grpo"},
}
"""Settings of a step for every method and every loss of the rollouts."""


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_is_that_of_the_turns(name: str) -> None:
    """Loss and gradient of every parameter, from padded and from packed rows, against fp64 turn by turn."""
    rows = given_rows()
    settings: dict[str, Any] = {"weights": WEIGHTS, **SETTINGS[name]}
    assert sum(len(row.given) > 1 for row in rows) >= 4
    model = make_model().double()
    options = {key: value for key, value in settings.items() if key != "weights"}
    expected = plain_loss(rows, model, settings["weights"], options)
    expected.backward()
    for packed in (False, True):
        batches = micro_batches(rows, pad_id=0, max_tokens=90, packed=packed)
        assert len(batches) > 1
        got, gradients = step(batches, rows, old_logprobs=off_policy(batches), **settings)
        assert got.sums["loss"] == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
        largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
        assert largest > 1e-3
        for mine, theirs in zip(gradients, model.parameters(), strict=True):
            assert theirs.grad is not None
            assert_close(mine.double(), theirs.grad, atol=1e-5 * largest, rtol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_metrics_count_written_tokens(packed: bool) -> None:
    """Everything that a step measures, from the turns in plain Python floats."""
    rows, model = given_rows(), make_model().double()
    batches = micro_batches(rows, pad_id=0, max_tokens=90, packed=packed)
    settings: dict[str, Any] = EVERY | {"token_weight": "phi", "importance_cap": 1.2}
    got = step(batches, rows, old_logprobs=off_policy(batches), **settings)[0].sums
    expected = dict.fromkeys(("nll", "rollout_tokens", "entropy", "clip_low", "clip_high"), 0.0)
    chosen = rejected = preferred = 0.0

    def reward(row: Row) -> float:
        assert row.ref_logprobs is not None
        own = read(model, row).logprobs.tolist()
        return 0.3 * sum(p - q for p, q in zip(own, row.ref_logprobs, strict=True))

    with torch.no_grad():
        for row in rows:
            own = read(model, row)
            if "sft" in row.components:
                expected["nll"] -= float(own.logprobs.sum())
            if row.chosen is not None:
                one, other = reward(row.chosen), reward(row)
                chosen, rejected, preferred = chosen + one, rejected + other, preferred + (one > other)
            if "kl" not in row.components:
                continue
            expected["rollout_tokens"] += len(row.completion_ids) - sum(b - a for a, b in row.given)
            expected["entropy"] -= float((own.distributions.exp() * own.distributions).sum())
            assert row.sampling_logprobs is not None
            for new, old in zip(own.logprobs.tolist(), row.sampling_logprobs, strict=True):
                ratio = math.exp(new - old)
                if "rl" in row.components:
                    expected["clip_low"] += ratio < 0.8 and row.advantage < 0
                    expected["clip_high"] += ratio > 1.28 and row.advantage > 0
    expected |= {"chosen": chosen, "rejected": rejected, "preferred": preferred}
    # The old log-probabilities of the step are the sampler's.
    expected |= {"sampling_difference": 0.0, "importance": expected["rollout_tokens"]}
    assert min(expected[name] for name in ("clip_low", "clip_high", "preferred")) > 0
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("family", ["qwen3", "gemma2_softcap"])
def test_no_target_is_a_given_token(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output head computes log-probabilities of all written tokens, and of no other ones."""
    targets: list[int] = []
    name = "selected_logprobs" if family == "qwen3" else "logprobs_from_logits"
    original = getattr(policy_module, name)

    def recorded(*inputs: Any, **options: Any) -> Any:
        (ids,) = (x for x in inputs if x.dtype == torch.int64)
        targets.extend(ids[:, 0].tolist() if ids.ndim == 2 else ids.tolist())
        return original(*inputs, **options)

    rows = given_rows()
    weights: dict[str, Any] = {"weights": WEIGHTS | {"pref": 0.4, "entropy": -0.2}}
    before = step([collate(rows, pad_id=0)], rows, family=family, **weights)
    monkeypatch.setattr(policy_module, name, recorded)
    assert step([collate(rows, pad_id=0)], rows, family=family, **weights)[0].sums == before[0].sums
    written = [
        token
        for row in (*rows, *chosen_rows(rows))
        for token, own in zip(row.completion_ids, row.tokens.is_written, strict=True)
        if own
    ]
    assert targets == written
    assert not {*targets} & {*RESULT}


@pytest.mark.parametrize("name", ["every component", "top-k teacher", "gspo loss", "cispo loss"])
def test_poison_at_given_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN for all log-probabilities and entropies at given tokens: the same bits everywhere."""
    rows = given_rows()
    settings: dict[str, Any] = {"importance_cap": 1.2, **SETTINGS[name]}
    batch = collate(rows, pad_id=0)
    expected = step([batch], rows, old_logprobs=off_policy([batch]), **settings)
    forward, nan = Policy.forward, float("nan")

    def poisoned(self: Policy, ids: Tensor, *inputs: Any, **options: Any) -> tuple[Tensor, ...]:
        result, given = forward(self, ids, *inputs, **options), torch.isin(ids, torch.tensor(RESULT))
        assert given.any()
        return tuple(torch.where(given.view(*given.shape, *[1] * (x.ndim - 2)), nan, x) for x in result)

    monkeypatch.setattr(Policy, "forward", poisoned)
    given = torch.isin(batch.input_ids, torch.tensor(RESULT))
    values: dict[str, Any] = {
        field: torch.where(given, nan, getattr(batch, field))
        for field in ("sampling_logprobs", "ref_logprobs")
    }
    old = [torch.where(given, nan, off_policy([batch])[0])]
    got = step([replace(batch, **values)], rows, old_logprobs=old, **settings)
    assert got[0].sums == expected[0].sums
    for mine, theirs in zip(got[1], expected[1], strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_trajectories_may_be_cut_padded_packed_and_reordered(family: str, loss_type: str) -> None:
    rows = given_rows()
    settings: dict[str, Any] = {"family": family, "loss_type": loss_type, "token_weight": "phi"}
    settings["weights"] = EVERY["weights"] | {"kl": 0.02}
    expected = step([collate(rows, pad_id=0)], rows, **settings)
    long = Row(prompt_ids=(5,) * 40, completion_ids=(), components=frozenset())
    cut = [collate([*rows[i::3], long], pad_id=0, padding_side="left") for i in range(3)]
    assert_same(step(cut, rows, **settings), expected)
    for max_tokens in (1, 60, 10_000):
        for packed in (False, True):
            batches = micro_batches(rows[::-1], pad_id=0, max_tokens=max_tokens, packed=packed)
            assert_same(step(batches, rows, **settings), expected)
    batches = micro_batches(rows, pad_id=0, max_tokens=10_000, packed=True)
    for _ in range(3):
        batches = [half for batch in batches for half in halves(batch)]
        assert_same(step(batches, rows, **settings), expected)
