"""Packed rows: slots by hand, equality with padded rows, and models that cannot be packed."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from support.runs import lines, recipe, train
from support.tiny import CONFIGS, make_model, save_model
from uniapl.data.batching import Row, batch_sequences, collate, halves, micro_batches, shards
from uniapl.discriminator.bradley_terry import BradleyTerryDiscriminator, Comparison, ScoreModel
from uniapl.discriminator.lora import LoraTrunk
from uniapl.models.packing import NAME, Packing, can_pack
from uniapl.models.policy import Policy, inputs_of
from uniapl.training.monitor.metrics import update_metrics
from uniapl.training.update.batch import MixedBatch
from uniapl.training.update.policy_step import LossSettings, PolicyStep, policy_step
from uniapl.types import MicroBatch, Span

PACKING_FAMILIES = ("qwen3", "llama", "mistral_sliding", "gemma3", "gpt2")
WEIGHTS = {"sft": 0.3, "rl": 0.7, "adv": 0.5, "kl": 0.0}


def group_rows(*, groups: int = 3, seed: int = 0) -> list[Row]:
    """Rollouts and a demonstration for each of some prompts; lengths differ, prompts are shared."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(4, 60, (length,), generator=generator).tolist())

    rows: list[Row] = []
    for _ in range(groups):
        prompt = ids(1, 12)
        for number in range(4):
            completion = ids(1, 4) if number == 3 else ids(1, 20)
            advantage = float(torch.randn((), generator=generator))
            rows.append(
                Row(
                    prompt_ids=prompt,
                    completion_ids=completion,
                    components=frozenset({"rl", "adv", "kl"}),
                    advantage=advantage,
                    adversarial_advantage=advantage - 0.3,
                    temperature=0.8,
                    sampling_logprobs=(-1.0,) * len(completion),
                )
            )
        rows.append(Row(prompt_ids=prompt, completion_ids=ids(1, 9), components=frozenset({"sft"})))
    return rows


def gradient(batches: list[MicroBatch], rows: list[Row], family: str = "qwen3") -> tuple[float, list[Tensor]]:
    """Loss and gradients of a step with all loss components, in double precision except for rotary tables."""
    policy = Policy(make_model(family).double())
    assert policy.packs
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    kept: list[Tensor] = []
    optimizer.register_step_pre_hook(lambda *_: kept.extend(p.grad.clone() for p in policy.parameters()))
    result = policy_step(
        Accelerator(cpu=True),
        policy,
        optimizer,
        MixedBatch(rows=rows, micro_batches=batches, weights=WEIGHTS),
        LossSettings(clip_low=0.2, clip_high=0.2),
    )
    return result.sums["loss"], kept


def assert_same(got: tuple[float, list[Tensor]], expected: tuple[float, list[Tensor]]) -> None:
    assert got[0] == pytest.approx(expected[0], rel=1e-7)
    assert max(float(g.abs().max()) for g in expected[1]) > 1e-3
    for mine, theirs in zip(got[1], expected[1], strict=True):
        assert_close(mine, theirs, atol=1e-7, rtol=1e-4)


def test_slots_by_hand() -> None:
    """The example in the module's docstring, and a left-padded row with another prompt."""
    spans = [Span(0, 2, 4, 7), Span(0, 2, 5, 7), Span(2, 1, 3, 9)]
    packing = Packing(spans, 5, torch.device("cpu"))
    assert packing.slots.tolist() == [[0, 1, 3, 4, 0], [0, 1, 5, 6, 7], [0, 0, 2, 8, 9]]
    assert packing.tokens.tolist() == [0, 1, 12, 2, 3, 7, 8, 9, 13, 14]


def test_a_long_prompt_does_not_widen_the_others() -> None:
    """Attention reads at most 1.3 times the necessary keys; each row has a different prompt."""
    lengths = [(300, 40), (290, 6), *[(8, 6)] * 20, *[(9, 40)] * 3]
    spans = [Span(0, prompt, prompt + answer, n) for n, (prompt, answer) in enumerate(lengths)]
    packing = Packing(spans, 340, torch.device("cpu"))
    read = sum(block.keys.numel() for block in packing.blocks)
    needed = sum(2 * prompt + answer for prompt, answer in lengths)
    assert read <= 1.3 * needed


@pytest.mark.parametrize("window", [None, 1, 3])
def test_padded_queries_see_a_key(window: int | None) -> None:
    """Some kernels fail on queries without keys, which padding would create."""
    spans = [Span(0, 1, 2, 0), Span(0, 9, 30, 1), Span(0, 12, 30, 2)]
    packing = Packing(spans, 30, torch.device("cpu"))
    for block, mask in zip(packing.blocks, packing.masks(window, torch.float32), strict=True):
        if mask is None:
            continue
        visible = (mask[:, 0] == 0).sum(dim=-1)
        assert torch.all(visible >= 1)
        span = block.query_positions + 1 if window is None else (block.query_positions + 1).clamp(max=window)
        assert_close(visible[block.is_query], span[block.is_query])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", PACKING_FAMILIES)
def test_packed_is_padded(family: str, side: Any) -> None:
    """The loss of all components and every gradient; windows of 4 tokens are shorter than the rows."""
    rows = group_rows()
    packed = [collate(rows, pad_id=0, padding_side=side, packed=True)]
    assert_same(gradient(packed, rows, family), gradient([collate(rows, pad_id=0)], rows, family))


@pytest.mark.parametrize("max_tokens", [1, 30, 75, 10_000])
@pytest.mark.parametrize("pad_id", [0, 63])
def test_the_cut_changes_nothing(max_tokens: int, pad_id: int) -> None:
    rows = group_rows(seed=1)
    batches = micro_batches(rows, pad_id=pad_id, max_tokens=max_tokens, packed=True)
    assert all(batch.tokens <= max_tokens or len(batch.spans) == 1 for batch in batches)
    expected = gradient([collate(rows, pad_id=0)], rows)
    assert_same(gradient(batches, rows), expected)
    assert_same(gradient([half for batch in batches for half in halves(batch)], rows), expected)


def test_a_row_s_neighbours_do_not_reach_it() -> None:
    """Log-probabilities are bit-identical for all other completions of the same prompt."""
    rows = group_rows(groups=1)
    policy = Policy(make_model())

    def logprobs(rows: list[Row]) -> Tensor:
        batch = collate(rows, pad_id=0, packed=True)
        return policy(*inputs_of(batch, batch.rollout_mask))[0]

    poisoned = [rows[0]] + [replace(r, completion_ids=(63,) * len(r.completion_ids)) for r in rows[1:]]
    torch.testing.assert_close(logprobs(rows)[0], logprobs(poisoned)[0], atol=0.0, rtol=0.0)
    assert not torch.equal(logprobs(rows)[1], logprobs(poisoned)[1])


def test_tokens_count_a_prompt_once() -> None:
    rows = group_rows()
    once = {row.prompt_ids for row in rows}
    expected = sum(map(len, once)) + sum(len(row.completion_ids) for row in rows)
    batch = collate(rows, pad_id=0, packed=True)
    assert batch.tokens == expected
    assert len(Packing(batch.spans, batch.input_ids.shape[1], torch.device("cpu")).tokens) == expected
    assert collate(rows, pad_id=0).tokens == len(rows) * max(row.length for row in rows)


SEQUENCES = st.lists(
    st.tuples(st.integers(0, 3).map(lambda n: (n,) * (n + 1)), st.integers(0, 6).map(lambda n: (5,) * n)),
    min_size=1,
    max_size=20,
)


@given(SEQUENCES, st.integers(1, 40), st.none() | st.integers(1, 5))
def test_batches_by_prompt(sequences: list[Any], max_tokens: int, max_rows: int | None) -> None:
    batches = batch_sequences(sequences, max_tokens=max_tokens, max_rows=max_rows, packed=True)
    assert sorted(index for batch in batches for index in batch) == list(range(len(sequences)))

    def tokens(batch: list[int]) -> int:
        prompts = {sequences[index][0] for index in batch}
        return sum(map(len, prompts)) + sum(len(sequences[index][1]) for index in batch)

    for batch in batches:
        assert len(batch) == 1 or tokens(batch) <= max_tokens
        assert max_rows is None or len(batch) <= max_rows
    for prompt in {prompt for prompt, _ in sequences}:
        group = [index for index, (other, _) in enumerate(sequences) if other == prompt]
        if tokens(group) <= max_tokens and (max_rows is None or len(group) <= max_rows):
            assert sum(not set(group).isdisjoint(batch) for batch in batches) == 1, (
                "a group that fits is not split"
            )


@given(st.integers(1, 6), st.integers(0, 5))
def test_shards_keep_prompts_together_and_balance_the_load(number: int, seed: int) -> None:
    rows = group_rows(groups=8, seed=seed)
    dealt = shards(rows, number)
    assert len(dealt) == number
    assert sorted(map(id, (row for share in dealt for row in share))) == sorted(map(id, rows))
    owners = [{row.prompt_ids for row in share} for share in dealt]
    assert sum(map(len, owners)) == len({row.prompt_ids for row in rows})
    loads = [collate(share, pad_id=0, packed=True).tokens if share else 0 for share in dealt]
    largest = max(
        collate([row for row in rows if row.prompt_ids == prompt], pad_id=0, packed=True).tokens
        for prompt in {row.prompt_ids for row in rows}
    )
    assert max(loads) - min(loads) <= largest


def test_rows_without_a_gradient() -> None:
    rows = group_rows()
    silent = replace(rows[0], advantage=0.0, adversarial_advantage=0.0)
    assert [row.has_gradient(WEIGHTS) for row in (rows[0], silent, rows[4])] == [True, False, True]
    assert silent.has_gradient(WEIGHTS | {"kl": 0.1}), "the KL term needs its log-probabilities"
    assert not replace(rows[0], advantage=0.0).has_gradient(WEIGHTS | {"adv": 0.0})
    every = [silent, *rows[1:]]
    without = [row for row in every if row.has_gradient(WEIGHTS)]
    assert_same(
        gradient([collate(without, pad_id=0, packed=True)], every),
        gradient([collate(every, pad_id=0)], every),
    )


def test_a_run_does_not_read_them(model_dir: Path, tmp_path: Path) -> None:
    """With equal rewards no rollout is computed, packed or padded, and metrics that need it are null."""
    for packing in (True, False):
        output = tmp_path / str(packing)
        values = recipe(
            model_dir,
            output,
            method="grpo",
            max_steps=1,
            batching={"packing": packing},
            objective={"beta": 0.0},
        )
        train(values, reward_functions=[lambda completions: [1.0] * len(completions)])
        (record,) = lines(output / "metrics.jsonl")
        assert record["tokens/rollout"] > 0
        assert record["grad_norm"] == 0
        assert record["trained/entropy"] is record["trained/sampling_logp_difference/max"] is None
        assert record["rollout/entropy_estimate"] > 0


def test_means_of_the_rollouts_that_were_read() -> None:
    """8 of 50 tokens were computed; the mean of a component is over all of its tokens."""
    step = PolicyStep(
        applied=True,
        grad_norm=1.0,
        sums={
            "loss": 0.5,
            "rl": 20.0,
            "adv": 0.0,
            "sft": 0.0,
            "rollout_tokens": 8.0,
            "entropy": 12.0,
            "clip_low": 4.0,
            "clip_high": 2.0,
            "sampling_difference_max": 0.0,
        },
        old_logprobs=[],
    )
    counts = {"sft": 10, "rl": 40, "adv": 40, "kl": 50}
    metrics = update_metrics(step, counts, {"sft": 0.0, "rl": 1.0, "adv": 0.0, "kl": 0.0})
    assert metrics["trained/entropy"] == 1.5
    assert metrics["loss/rl"] == 0.5
    # TRL divides by all rollout tokens, also by those without a reward.
    assert [metrics[f"clip_ratio/{side}_mean"] for side in ("low", "high", "region")] == [0.08, 0.04, 0.12]
    assert metrics["loss/sft"] is metrics["loss/adv"] is None, "components without weight are not computed"


def test_which_models_pack() -> None:
    assert {f: can_pack(make_model(f).base_model) for f in sorted(CONFIGS)} == {
        f: f in PACKING_FAMILIES for f in sorted(CONFIGS)
    }
    eager = make_model()
    eager.set_attn_implementation("eager")
    assert not can_pack(eager.base_model)
    assert eager.config._attn_implementation == "eager"


def shifted(module: Any, inputs: Any, output: Any) -> Any:
    """A hook that mixes each token with the one before it, like a convolution."""
    hidden = output[0] if isinstance(output, tuple) else output
    return hidden + 0.1 * hidden.roll(1, dims=1)


def test_a_model_that_mixes_tokens_otherwise_is_found_out() -> None:
    model = make_model()
    model.base_model.layers[0].register_forward_hook(shifted)
    assert not can_pack(model.base_model)
    assert model.config._attn_implementation == "sdpa"
    policy = Policy(model)
    batch = collate(group_rows(), pad_id=0, packed=True)
    padded = replace(batch, spans=())
    got, expected = (policy(*inputs_of(b, b.sft_mask))[0] for b in (batch, padded))
    assert_close(got, expected, atol=0.0, rtol=0.0)


def test_windows_that_attention_is_not_told_of_are_refused() -> None:
    """The layers do not pass the window on, and the probe is too short to show it."""
    model = make_model("mistral_sliding")
    model.config.sliding_window = 64
    for layer in model.base_model.layers:
        layer.self_attn.config = copy.copy(model.config)
        layer.self_attn.config.sliding_window = None
    assert not can_pack(model.base_model)


@pytest.mark.parametrize(("lora", "unpaired"), [(None, False), (2, False), (2, True)])
def test_the_discriminator_packs(lora: int | None, unpaired: bool) -> None:
    comparisons = [
        Comparison(prompt_ids=(5, 9, n), demonstration_ids=(7, 8), completions=((4,), (6, 6, 6, n), (8, 9)))
        for n in (10, 11, 12)
    ]
    results: list[tuple[list[float], list[Tensor]]] = []
    for packed in (False, True):
        model = make_model()
        module = ScoreModel(LoraTrunk(model, lora, seed=0)) if lora else ScoreModel.copy_of(model)
        assert can_pack(module.trunk)
        torch.nn.init.normal_(module.head.weight, generator=torch.Generator().manual_seed(0))
        subject = BradleyTerryDiscriminator(
            module=module, pad_id=0, max_tokens=40, packed=packed, unpaired=unpaired
        )
        logits = subject.logits([s for c in comparisons for s in c.sequences])
        for compute in subject.losses(comparisons):
            torch.stack([*compute().values()]).sum().backward()
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        results.append((logits, grads))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert len(set(results[0][0])) > 5
    for mine, theirs in zip(results[1][1], results[0][1], strict=True):
        assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["uniapl", "grpo"])
def test_a_run_is_the_same_packed_and_padded(method: str, model_dir: Path, tmp_path: Path) -> None:
    records: dict[bool, list[dict[str, Any]]] = {}
    for packing in (True, False):
        values = {"batching": {"packing": packing, "max_tokens_per_micro_batch": 400}, "max_steps": 4}
        train(recipe(model_dir, tmp_path / str(packing), method=method, **values))
        records[packing] = lines(tmp_path / str(packing) / "metrics.jsonl")
    apart = ("time/", "step_time")
    for one, other in zip(records[True], records[False], strict=True):
        for key, value in other.items():
            if not key.startswith(apart):
                assert one[key] == (
                    pytest.approx(value, rel=1e-3, abs=1e-5) if value is not None else None
                ), key


def test_a_run_says_that_it_cannot_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gemma = save_model(tmp_path / "gemma", family="gemma2_softcap")
    train(recipe(gemma, tmp_path / "run", max_steps=1))
    assert "does not support packing" in capsys.readouterr().out


def test_saved_weights_do_not_name_the_attention(tmp_path: Path) -> None:
    model = make_model()
    assert Policy(model).packs
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
