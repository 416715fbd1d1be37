"""Rows become padded micro-batches: masks by hand, counts, budgets, and nothing lost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.tiny import random_rows
from uniapl.data.batching import Row, collate, component_counts, micro_batches

DEMONSTRATION = Row(prompt_ids=(5, 9), completion_ids=(31, 1), components=frozenset({"sft"}))
ROLLOUT = Row(
    prompt_ids=(5,),
    completion_ids=(44, 45),
    components=frozenset({"rl", "kl"}),
    advantage=0.5,
    temperature=0.7,
    sampling_logprobs=(-1.0, -2.0),
)


def test_a_mixed_batch_by_hand() -> None:
    batch = collate([DEMONSTRATION, ROLLOUT], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 9, 31, 1], [5, 44, 45, 0]]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.position_ids.tolist()[0] == [0, 1, 2, 3]
    assert batch.sft_mask.int().tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    assert batch.rl_mask.int().tolist() == [[0, 0, 0, 0], [0, 1, 1, 0]]
    assert batch.rollout_mask.int().tolist() == [[0, 0, 0, 0], [0, 1, 1, 0]]
    assert not batch.adv_mask.any()
    assert batch.advantages.tolist() == [0.0, 0.5]
    assert batch.temperature.tolist() == pytest.approx([1.0, 0.7])
    assert batch.sampling_logprobs.tolist() == [[0, 0, 0, 0], [0, -1, -2, 0]]


def test_left_padding_by_hand() -> None:
    batch = collate([DEMONSTRATION, ROLLOUT], pad_id=0, padding_side="left")
    assert batch.input_ids.tolist() == [[5, 9, 31, 1], [0, 5, 44, 45]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 0, 1, 2]]
    assert batch.rl_mask.int().tolist() == [[0, 0, 0, 0], [0, 0, 1, 1]]
    assert batch.sampling_logprobs.tolist() == [[0, 0, 0, 0], [0, 0, -1, -2]]


def test_counts_by_hand() -> None:
    assert component_counts([DEMONSTRATION, ROLLOUT, ROLLOUT]) == {"sft": 2, "rl": 4, "adv": 0, "kl": 4}


def test_no_rows_give_a_batch_that_teaches_nothing() -> None:
    (batch,) = micro_batches([], pad_id=0, max_tokens=10)
    for mask in (batch.sft_mask, batch.rl_mask, batch.adv_mask, batch.rollout_mask):
        assert not mask.any()


@given(st.integers(0, 99), st.integers(1, 20), st.integers(1, 100), st.one_of(st.none(), st.integers(1, 5)))
def test_budgets_hold_and_nothing_is_lost(
    seed: int, count: int, max_tokens: int, max_rows: int | None
) -> None:
    rows = random_rows(seed, count)
    batches = micro_batches(rows, pad_id=0, max_tokens=max_tokens, max_rows=max_rows)
    counts = component_counts(rows)
    for name, mask in (("sft", "sft_mask"), ("rl", "rl_mask"), ("adv", "adv_mask"), ("kl", "rollout_mask")):
        assert sum(int(getattr(batch, mask).sum()) for batch in batches) == counts[name]
    for batch in batches:
        assert batch.input_ids.numel() <= max_tokens or len(batch.input_ids) == 1
        assert max_rows is None or len(batch.input_ids) <= max_rows
    tokens = sum((batch.input_ids * batch.attention_mask).sum() for batch in batches)
    assert tokens == sum(sum(row.prompt_ids + row.completion_ids) for row in rows)
    assert sum(int(batch.attention_mask.sum()) for batch in batches) == sum(row.length for row in rows)
    assert isinstance(tokens, torch.Tensor)
