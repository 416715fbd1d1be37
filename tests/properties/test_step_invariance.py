"""The gradient of a step does not depend on how its rows are cut, padded, ordered or spread on processes."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch.testing import assert_close

from support.processes import run_processes
from support.tiny import make_model, random_rows
from uniapl.config import methods
from uniapl.data.batching import Row, collate, component_counts, empty_micro_batch, halves, micro_batches
from uniapl.functional.losses import TokenWeight
from uniapl.models.policy import Policy
from uniapl.teacher.local import LocalTeacher
from uniapl.training.distributed.fsdp import full, is_sharded, num_empty_micro_batches, shard, shards_weights
from uniapl.training.update.accumulate import OutOfMemoryError
from uniapl.training.update.batch import MixedBatch
from uniapl.training.update.component_gradients import component_gradient_norms
from uniapl.training.update.policy_step import LossSettings, PolicyStep, policy_step
from uniapl.types import MicroBatch

WEIGHTS = {"sft": 0.3, "rl": 0.7, "adv": 0.5, "kl": 0.2}


class KeepGradients(torch.optim.SGD):
    """An optimizer that keeps the gradient of its step and changes nothing."""

    def step(self, closure: Any = None) -> None:
        self.gradients = [full(p.grad).clone() for group in self.param_groups for p in group["params"]]


def step(
    batches: Sequence[MicroBatch],
    rows: Sequence[Row],
    *,
    family: str = "qwen3",
    weights: dict[str, float] = WEIGHTS,
    token_weight: TokenWeight = "phi",
    old_logprobs: Sequence[torch.Tensor] | None = None,
    importance_cap: float | None = None,
    accelerator: Accelerator | None = None,
    top_k: int = 0,
    **settings: Any,
) -> tuple[PolicyStep, list[torch.Tensor]]:
    """One policy step on all components, KL included; its result and the gradient of every parameter."""
    accelerator = accelerator or Accelerator(cpu=True)
    inner = Policy(make_model(family))
    policy = shard(accelerator, inner) if shards_weights() else accelerator.prepare_model(inner)
    assert is_sharded(policy) == shards_weights()
    if weights.get("teacher"):
        batches = LocalTeacher(model=Policy(make_model(family, seed=3)), top_k=top_k).read(batches)
    optimizer = KeepGradients(policy.parameters(), lr=1.0)
    result = policy_step(
        accelerator,
        policy,
        optimizer,
        MixedBatch(rows=rows, micro_batches=batches, weights=weights),
        LossSettings(
            clip_low=0.2,
            clip_high=0.28,
            token_weight=token_weight,
            importance_cap=importance_cap,
            **settings,
        ),
        old_logprobs,
    )
    return result, optimizer.gradients


def one_batch(rows: Sequence[Row]) -> tuple[PolicyStep, list[torch.Tensor]]:
    return step([collate(rows, pad_id=0)], rows)


def assert_same(
    got: tuple[PolicyStep, list[torch.Tensor]], expected: tuple[PolicyStep, list[torch.Tensor]]
) -> None:
    assert expected[0].grad_norm > 0.1
    assert got[0].sums["loss"] == pytest.approx(expected[0].sums["loss"], rel=1e-5)
    for name, value in expected[0].sums.items():
        assert got[0].sums[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for mine, theirs in zip(got[1], expected[1], strict=True):
        assert_close(mine, theirs, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("parts", [1, 3])
def test_component_norms_are_those_of_the_weighted_terms(parts: int) -> None:
    """Each component by itself, through the same step; measuring leaves no gradient behind."""
    rows = random_rows()
    policy = Policy(make_model())
    norms = component_gradient_norms(
        Accelerator(cpu=True),
        policy,
        MixedBatch(
            rows=rows,
            micro_batches=[collate(rows[i::parts], pad_id=0) for i in range(parts)],
            weights=WEIGHTS,
        ),
        LossSettings(clip_low=0.2, clip_high=0.28, token_weight="phi"),
    )
    assert all(parameter.grad is None for parameter in policy.parameters())
    names = ("sft", "rl", "adv")
    alone: dict[str, torch.Tensor] = {}
    for name in names:
        only = {other: WEIGHTS[name] if other == name else 0.0 for other in WEIGHTS}
        _, gradients = step([collate(rows, pad_id=0)], rows, weights=only)
        alone[name] = torch.cat([gradient.flatten() for gradient in gradients]).double()
    expected = {f"grad_norm/{name}": float(alone[name].norm()) for name in names}
    for one, other in (("sft", "rl"), ("sft", "adv"), ("rl", "adv")):
        cosine = torch.cosine_similarity(alone[one], alone[other], dim=0)
        expected[f"grad_cosine/{one}_{other}"] = float(cosine)
    assert norms == pytest.approx(expected, rel=1e-3)
    assert max(abs(norms[f"grad_cosine/{pair}"]) for pair in ("sft_rl", "sft_adv", "rl_adv")) < 0.99


def test_a_component_without_weight_is_not_measured() -> None:
    rows = random_rows()
    weights = {"sft": 0.0, "rl": 1.0, "adv": 0.5, "kl": 0.0}
    silent = [replace(row, adversarial_advantage=0.0) for row in rows]
    norms = component_gradient_norms(
        Accelerator(cpu=True),
        Policy(make_model()),
        MixedBatch(rows=silent, micro_batches=[collate(silent, pad_id=0)], weights=weights),
        LossSettings(clip_low=0.2, clip_high=0.2),
    )
    assert norms.keys() == {"grad_norm/rl", "grad_norm/adv"}
    assert norms["grad_norm/adv"] == 0.0


@pytest.mark.parametrize("parts", [2, 5])
def test_micro_batches(parts: int) -> None:
    rows = random_rows()
    cut = [collate(rows[i::parts], pad_id=0) for i in range(parts)]
    assert_same(step(cut, rows), one_batch(rows))


@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_token_budgets(max_tokens: int) -> None:
    rows = random_rows()
    assert_same(step(micro_batches(rows, pad_id=0, max_tokens=max_tokens), rows), one_batch(rows))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma2_softcap", "gpt2"])
def test_padding_side_and_amount(side: Literal["left", "right"], family: str) -> None:
    """A long row of no component is added, so that all others are padded far; on either side."""
    rows = random_rows()
    long = Row(prompt_ids=(5,) * 40, completion_ids=(), components=frozenset())
    padded = collate([*rows, long], pad_id=0, padding_side=side)
    assert_same(step([padded], rows, family=family), step([collate(rows, pad_id=0)], rows, family=family))


def test_order_of_rows() -> None:
    rows = random_rows()
    assert_same(one_batch(rows[::-1]), one_batch(rows))


@pytest.mark.parametrize("pad_id", [1, 17])
def test_pad_token(pad_id: int) -> None:
    """Also when it is the end token, or an ordinary one: masks come from lengths."""
    rows = random_rows()
    assert_same(step([collate(rows, pad_id=pad_id)], rows), one_batch(rows))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e9])
def test_poison_outside_the_masks(poison: float) -> None:
    rows = random_rows()
    batch = collate(rows, pad_id=0)
    poisoned = replace(
        batch,
        sampling_logprobs=torch.where(batch.rollout_mask, batch.sampling_logprobs, poison),
        advantages=torch.where(batch.rl_mask.any(-1), batch.advantages, poison),
        adversarial_advantages=torch.where(batch.adv_mask.any(-1), batch.adversarial_advantages, poison),
    )
    old = torch.where(batch.rollout_mask, batch.sampling_logprobs, 0.0)
    got = step([poisoned], rows, old_logprobs=[torch.where(batch.rollout_mask, old, poison)])
    expected = step([batch], rows, old_logprobs=[old])
    for mine, theirs in zip(got[1], expected[1], strict=True):
        assert torch.equal(mine, theirs)
    assert got[0].sums == expected[0].sums


def test_more_demonstrations_do_not_rescale_the_rollouts_term() -> None:
    """Every demonstration five times over: the same means, hence the same gradient."""
    rows = random_rows()
    demonstrations = [row for row in rows if "sft" in row.components]
    assert_same_gradient = step([collate(rows + demonstrations * 4, pad_id=0)], rows + demonstrations * 4)[1]
    for mine, theirs in zip(assert_same_gradient, one_batch(rows)[1], strict=True):
        assert_close(mine, theirs, atol=2e-6, rtol=1e-4)


def test_components_add_up() -> None:
    """The gradient of the mixed step is the weighted sum of the gradients of its components."""
    rows = random_rows()
    batch = [collate(rows, pad_id=0)]
    total = [torch.zeros_like(g) for g in step(batch, rows)[1]]
    for name, weight in WEIGHTS.items():
        alone = step(batch, rows, weights=dict.fromkeys(WEIGHTS, 0.0) | {name: 1.0})[1]
        total = [sum_ + weight * gradient for sum_, gradient in zip(total, alone, strict=True)]
    for mine, theirs in zip(total, one_batch(rows)[1], strict=True):
        assert_close(mine, theirs, atol=2e-6, rtol=1e-4)


def test_on_policy_step_is_reinforce() -> None:
    """With the update's own log-probs as old ones, the RL gradient is that of - sum A log p / N."""
    rows = random_rows()
    batch = collate(rows, pad_id=0)
    got = step([batch], rows, weights={"sft": 0.0, "rl": 1.0, "adv": 0.0, "kl": 0.0})[1]
    policy = Policy(make_model())
    logprobs, _ = policy(
        batch.input_ids, batch.attention_mask, batch.position_ids, batch.rollout_mask, batch.temperature
    )
    credit = torch.where(batch.rl_mask, logprobs, 0.0) * batch.advantages.unsqueeze(-1)
    (-credit.sum() / component_counts(rows)["rl"]).backward()
    for mine, theirs in zip(got, policy.parameters(), strict=True):
        assert theirs.grad is not None
        assert_close(mine, theirs.grad, atol=1e-6, rtol=1e-4)


def test_a_second_update_is_measured_against_the_first_one_s_policy() -> None:
    """Given old log-probs 0.5 nats away, every ratio is e^0.5: the sum is that of the clipped surrogate."""
    rows = random_rows()
    batch = collate(rows, pad_id=0)
    first, _ = step([batch], rows)
    shifted = [torch.where(batch.rollout_mask, old - 0.5, 0.0) for old in first.old_logprobs]
    second, _ = step([batch], rows, old_logprobs=shifted)
    ratio = math.exp(0.5)
    expected = 0.0
    for row in rows:
        if "rl" in row.components:
            expected -= len(row.completion_ids) * min(ratio * row.advantage, 1.28 * row.advantage)
    assert second.sums["rl"] == pytest.approx(expected, rel=1e-4)
    assert second.sums["clip_high"] == sum(
        len(row.completion_ids) for row in rows if "rl" in row.components and row.advantage > 0
    )


def test_importance_weights_scale_the_tokens_terms() -> None:
    """If the sampler's probabilities were 1.5 or 5 times lower, advantages are scaled by 1.5 and 2 (the cap).

    The SFT and KL terms do not depend on the sampler.
    """
    rows = random_rows()
    batch = collate(rows, pad_id=0)
    (logprobs,) = step([batch], rows)[0].old_logprobs
    less_sure = [(1.5, 5.0)[number % 2] for number in range(len(rows))]
    sampling = logprobs - torch.tensor(less_sure).log().unsqueeze(-1)
    reported = replace(batch, sampling_logprobs=torch.where(batch.rollout_mask, sampling, 0.0))
    weighted = [
        replace(
            row,
            advantage=row.advantage * min(factor, 2.0),
            adversarial_advantage=row.adversarial_advantage * min(factor, 2.0),
        )
        for row, factor in zip(rows, less_sure, strict=True)
    ]
    got, gradients = step([reported], rows, importance_cap=2.0)
    expected, expected_gradients = one_batch(weighted)
    for name in ("loss", "sft", "rl", "adv", "kl"):
        assert got.sums[name] == pytest.approx(expected.sums[name], rel=1e-4, abs=1e-5), name
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        assert_close(mine, theirs, atol=2e-6, rtol=1e-4)
    tokens = [len(row.completion_ids) if row.sampling_logprobs else 0 for row in rows]
    mean = sum(n * min(f, 2.0) for n, f in zip(tokens, less_sure, strict=True)) / sum(tokens)
    assert got.sums["importance"] / component_counts(rows)["kl"] == pytest.approx(mean, rel=1e-4)
    unweighted, gradients = step([reported], rows)
    assert "importance" not in unweighted.sums
    for mine, theirs in zip(gradients, one_batch(rows)[1], strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_leaves_the_weights_alone(poison: float) -> None:
    rows = random_rows()
    batch = collate(rows, pad_id=0)
    bad = replace(batch, advantages=torch.full_like(batch.advantages, poison))
    policy = Policy(make_model())
    before = [p.clone() for p in policy.parameters()]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1.0)
    settings = LossSettings(clip_low=0.2, clip_high=0.2, max_grad_norm=1.0)

    def update(micro_batch: MicroBatch) -> PolicyStep:
        mixed = MixedBatch(rows=rows, micro_batches=[micro_batch], weights=WEIGHTS | {"kl": 0.0})
        return policy_step(Accelerator(cpu=True), policy, optimizer, mixed, settings)

    result = update(bad)
    assert not result.applied
    assert not optimizer.state, "the optimizer's moments must not change either"
    for mine, theirs in zip(policy.parameters(), before, strict=True):
        assert torch.equal(mine, theirs)
    assert update(batch).applied


METHODS: dict[str, tuple[dict[str, float], TokenWeight]] = {
    "sft": ({"sft": 1.0, "rl": 0.0, "adv": 0.0, "kl": 0.0}, "none"),
    "a-sft": ({"sft": 1.0, "rl": 0.0, "adv": 0.5, "kl": 0.0}, "none"),
    "grpo": ({"sft": 0.0, "rl": 1.0, "adv": 0.0, "kl": 0.1}, "none"),
    "a-grpo": ({"sft": 0.0, "rl": 1.0, "adv": 0.5, "kl": 0.1}, "none"),
    "chord-mu": ({"sft": 0.9, "rl": 0.1, "adv": 0.0, "kl": 0.0}, "none"),
    "chord-phi": ({"sft": 0.1, "rl": 0.9, "adv": 0.0, "kl": 0.0}, "phi"),
    "uniapl": ({"sft": 0.4, "rl": 0.6, "adv": 0.5, "kl": 0.1}, "none"),
    "gad": ({"sft": 0.0, "rl": 0.0, "adv": 1.0, "kl": 0.0}, "none"),
    "opd": ({"sft": 0.0, "rl": 0.0, "adv": 0.0, "kl": 0.0, "teacher": 1.0}, "none"),
}
"""The weights of each method at one of its steps."""


def test_the_table_has_every_method() -> None:
    assert METHODS.keys() == methods.METHODS.keys()


@pytest.mark.parametrize("family", ["qwen3", "gemma2_softcap"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_a_teacher_s_top_k_may_be_cut_padded_and_packed(family: str, loss_type: str) -> None:
    rows = random_rows()
    settings: dict[str, Any] = {"family": family, "top_k": 3, "loss_type": loss_type}
    settings["weights"] = WEIGHTS | {"teacher": 0.6}
    expected = step([collate(rows, pad_id=0)], rows, **settings)
    without = step([collate(rows, pad_id=0)], rows, **settings | {"weights": WEIGHTS})
    assert abs(expected[0].sums["loss"] - without[0].sums["loss"]) > 0.01
    long = Row(prompt_ids=(5,) * 40, completion_ids=(), components=frozenset())
    cut = [collate([*rows[i::3], long], pad_id=0, padding_side="left") for i in range(3)]
    assert_same(step(cut, rows, **settings), expected)
    packed = [collate(rows[i::2], pad_id=0, packed=True) for i in range(2)]
    assert_same(step(packed, rows, **settings), expected)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_may_be_cut_and_padded(method: str) -> None:
    rows = random_rows()
    weights, token_weight = METHODS[method]
    long = Row(prompt_ids=(5,) * 40, completion_ids=(), components=frozenset())
    cut = [collate([*rows[i::3], long], pad_id=0, padding_side="left") for i in range(3)]
    expected = step([collate(rows, pad_id=0)], rows, weights=weights, token_weight=token_weight)
    assert_same(step(cut, rows, weights=weights, token_weight=token_weight), expected)


LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 12},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo"},
    "entropy": {"weights": WEIGHTS | {"entropy": -0.4}},
}
"""Settings of a step for each loss of the rollouts, all off-policy; 0.28 is cispo's largest ratio."""


def off_policy(batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
    """The old log-probabilities: those that the sampler reported."""
    return [torch.where(batch.rollout_mask, batch.sampling_logprobs, 0.0) for batch in batches]


def loss_step(
    name: str, batches: Sequence[MicroBatch], rows: Sequence[Row], **options: Any
) -> tuple[PolicyStep, list[torch.Tensor]]:
    return step(batches, rows, old_logprobs=off_policy(batches), **(LOSSES[name] | options))


def likely_rows() -> list[Row]:
    """Rollouts whose sampling log-probabilities are 0.3 nats from the model's, so that ratios are near 1."""
    rows = random_rows()
    batch = collate(rows, pad_id=0)
    logprobs = step([batch], rows)[0].old_logprobs[0]
    return [
        replace(
            row,
            sampling_logprobs=tuple(
                value - 0.3 * (-1) ** position
                for position, value in enumerate(logprobs[number, len(row.prompt_ids) : row.length].tolist())
            ),
        )
        if row.sampling_logprobs
        else row
        for number, row in enumerate(rows)
    ]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_may_be_cut_padded_and_reordered(loss: str) -> None:
    rows = likely_rows()
    expected = loss_step(loss, [collate(rows, pad_id=0)], rows)
    long = Row(prompt_ids=(5,) * 40, completion_ids=(), components=frozenset())
    cut = [collate([*rows[::-1][i::3], long], pad_id=0, padding_side="left") for i in range(3)]
    assert_same(loss_step(loss, cut, rows), expected)
    # The loss is another one than dapo's.
    plain = step([collate(rows, pad_id=0)], rows, old_logprobs=off_policy([collate(rows, pad_id=0)]))
    assert abs(plain[0].sums["loss"] - expected[0].sums["loss"]) > 1e-3


@pytest.mark.parametrize("loss", LOSSES)
def test_poison_outside_the_masks_of_every_loss(loss: str) -> None:
    rows = likely_rows()
    batch = collate(rows, pad_id=0)
    nan = float("nan")
    poisoned = replace(
        batch,
        sampling_logprobs=torch.where(batch.rollout_mask, batch.sampling_logprobs, nan),
        ref_logprobs=torch.where(batch.rollout_mask, batch.ref_logprobs, nan),
        advantages=torch.where(batch.rl_mask.any(-1), batch.advantages, nan),
        adversarial_advantages=torch.where(batch.adv_mask.any(-1), batch.adversarial_advantages, nan),
    )
    expected = loss_step(loss, [batch], rows)
    got = step(
        [poisoned],
        rows,
        old_logprobs=[torch.where(batch.rollout_mask, off_policy([batch])[0], nan)],
        **LOSSES[loss],
    )
    for mine, theirs in zip(got[1], expected[1], strict=True):
        assert torch.equal(mine, theirs)
    assert got[0].sums == expected[0].sums


def test_demonstrations_do_not_depend_on_the_loss_type() -> None:
    """Their term is the mean over their tokens, whatever divides those of the rollouts."""
    rows = likely_rows()
    batches = [collate(rows, pad_id=0)]
    only = {"sft": 1.0, "rl": 0.0, "adv": 0.0, "kl": 0.0}
    expected = step(batches, rows, weights=only)
    for loss in ("grpo", "dr_grpo", "gspo", "cispo"):
        gradients = loss_step(loss, batches, rows, weights=only)[1]
        for mine, theirs in zip(gradients, expected[1], strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("component", ["rl", "adv", "kl"])
def test_in_grpo_every_completion_weighs_the_same(component: str) -> None:
    """For rewards, adversary and KL: the loss is the mean of the losses of each completion by itself."""
    rows = [row for row in likely_rows() if component in row.components]
    assert len({len(row.completion_ids) for row in rows}) > 1
    only = dict.fromkeys(WEIGHTS, 0.0) | {component: 1.0}
    together = loss_step("grpo", [collate(rows, pad_id=0)], rows, weights=only)[0].sums["loss"]
    alone = [
        step(
            [collate([row], pad_id=0)],
            [row],
            old_logprobs=off_policy([collate([row], pad_id=0)]),
            weights=only,
        )[0].sums["loss"]
        for row in rows
    ]
    assert together == pytest.approx(sum(alone) / len(alone), rel=1e-5)
    scaled = loss_step("dr_grpo", [collate(rows, pad_id=0)], rows, weights=only)[0].sums["loss"]
    lengths = [len(row.completion_ids) for row in rows]
    assert scaled == pytest.approx(
        sum(a * n for a, n in zip(alone, lengths, strict=True)) / len(rows) / 12, rel=1e-5
    )


def test_the_entropy_bonus_raises_the_entropy() -> None:
    """The component is the mean entropy of the rollout tokens, and its gradient that of the full logits."""
    rows = random_rows()
    batch = collate(rows, pad_id=0)
    got, gradients = step([batch], rows, weights=dict.fromkeys(WEIGHTS, 0.0) | {"entropy": -0.5})
    model = make_model()
    logits = (
        model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask.long(),
            position_ids=batch.position_ids,
        ).logits[:, :-1]
        / batch.temperature[:, None, None]
    )
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)[batch.rollout_mask[:, 1:]]
    (-0.5 * entropy.mean()).backward()
    assert got.sums["loss"] == pytest.approx(float(-0.5 * entropy.mean()), rel=1e-5)
    expected = [p.grad for p in model.parameters()]
    assert max(float(g.abs().max()) for g in gradients) > 1e-3
    for mine, theirs in zip(gradients, expected, strict=True):
        assert theirs is not None
        assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def _one_process(folder: Path, small_one: int | None, sharded: bool) -> None:
    """Run every method's step on this process's rows; rank 0 saves the results.

    Args:
        small_one: The rank whose memory holds two rows at most.
        sharded: Shard the parameters by FSDP2.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ |= {"ACCELERATE_USE_FSDP": str(sharded), "FSDP_VERSION": "2"}
    handler = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[handler])
    assert accelerator.num_processes == world
    rows = random_rows()
    share = rows[rank::world]
    # Unequal numbers of micro-batches: 2 rows in each on the first process, all in one on the others.
    batches = micro_batches(share, pad_id=0, max_tokens=10_000, max_rows=2 if rank == 0 else None)
    batches += [empty_micro_batch(0)] * num_empty_micro_batches(accelerator, len(batches))
    forward = Policy.forward

    def small(self: Policy, input_ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        if len(input_ids) > 2 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, input_ids, *args, **options)

    if rank == small_one:
        Policy.forward = small
    results: dict[str, Any] = {}
    for method, (weights, token_weight) in METHODS.items():
        settings: dict[str, Any] = {"weights": weights, "token_weight": token_weight}
        if small_one is not None:
            with pytest.raises(OutOfMemoryError):
                step(batches, rows, accelerator=accelerator, **settings)
            batches = [half for batch in batches for half in halves(batch)]
            batches = [half for batch in batches for half in halves(batch)]
            small_one = None
        result, gradients = step(batches, rows, accelerator=accelerator, **settings)
        results[method] = (result.sums, result.grad_norm, gradients)
    for loss in LOSSES:
        result, gradients = loss_step(loss, batches, rows, accelerator=accelerator)
        results[loss + " loss"] = (result.sums, result.grad_norm, gradients)
    if rank == 0:
        torch.save(results, folder / "result.pt")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "small_one", "sharded"), [(2, 1, False), (4, None, False), (2, None, True), (4, None, True)]
)
def test_processes(world: int, small_one: int | None, sharded: bool, tmp_path: Path) -> None:
    """Every method; also if one process runs out of memory, so that both split their micro-batches."""
    assert run_processes(world, _one_process, tmp_path, small_one, sharded) == [0] * world
    rows = random_rows()
    saved = torch.load(tmp_path / "result.pt", weights_only=True)
    for method, (weights, token_weight) in METHODS.items():
        sums, grad_norm, gradients = saved[method]
        result = PolicyStep(applied=True, grad_norm=grad_norm, sums=sums, old_logprobs=[])
        expected = step([collate(rows, pad_id=0)], rows, weights=weights, token_weight=token_weight)
        assert_same((result, gradients), expected)
    for loss in LOSSES:
        sums, grad_norm, gradients = saved[loss + " loss"]
        result = PolicyStep(applied=True, grad_norm=grad_norm, sums=sums, old_logprobs=[])
        assert_same((result, gradients), loss_step(loss, [collate(rows, pad_id=0)], rows))
