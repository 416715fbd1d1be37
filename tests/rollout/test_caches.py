"""A rollout that goes on from its cache is the one that is read again from its first token."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from support.sampling import local_sampler
from support.tiny import SMALL
from uniapl.rollout import SampleRequest
from uniapl.rollout.caches import Cache, RowCaches
from uniapl.rollout.fused import FusedDecoder
from uniapl.rollout.local import LocalSampler
from uniapl.types import Rollout, TokenIds

PROMPTS = [(5, 6, 7), (9,), (11, 12, 13, 14, 15, 16, 17), (20, 21), (30, 31, 32)]
RESULTS = [(40,), (41, 42, 43), (44, 45), (46, 47, 48, 49), (50,)]
WINDOWS = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
MODELS: dict[str, PretrainedConfig] = {
    "qwen3": Qwen3Config(**SMALL),
    "qwen2, a window in one layer": Qwen2Config(**SMALL, **WINDOWS),
    "llama": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "mistral, a window": MistralConfig(**SMALL, sliding_window=4),
}


def sampler_of(config: PretrainedConfig, **settings: Any) -> LocalSampler:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    defaults: dict[str, Any] = {"stop_ids": range(1, 20), "pad_id": 0, "max_completion_length": 14}
    return local_sampler(model=model, **defaults | settings)


def turns(sampler: LocalSampler, caches: RowCaches | None) -> list[list[Rollout]]:
    """Three turns of all rollouts, with a result after each; truncated ones go on, too."""
    request = SampleRequest(prompts=PROMPTS, seeds=range(5), num_generations=3, caches=caches)
    first = [rollout for group in sampler.sample(request) for rollout in group]
    found, contexts = [first], [prompt for prompt in PROMPTS for _ in range(3)]
    for _ in range(2):
        results = [RESULTS[number % 5] for number in range(15)]
        contexts = [
            ids + rollout.completion_ids + result
            for ids, rollout, result in zip(contexts, found[-1], results, strict=True)
        ]
        request = replace(request, prompts=contexts, seeds=range(100, 115), num_generations=1)
        found.append([rollout for (rollout,) in sampler.sample(request)])
    return found


@pytest.mark.parametrize("decoding", ["fused", "plain"])
@pytest.mark.parametrize("model", MODELS)
def test_turns_are_the_same_from_caches(model: str, decoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = sampler_of(MODELS[model], decoding=decoding)
    assert sampler.fused == (decoding == "fused")
    expected = turns(sampler, None)
    # What memory held before must not matter.
    for allocate in (torch.empty, torch.empty_like):
        name = allocate.__name__
        monkeypatch.setattr(torch, name, lambda *a, make=allocate, **k: make(*a, **k).fill_(torch.nan))
    caches = RowCaches()
    for ours, reference in zip(turns(sampler, caches), expected, strict=True):
        assert [r.completion_ids for r in ours] == [r.completion_ids for r in reference]
        assert [r.finish_reason for r in ours] == [r.finish_reason for r in reference]
        got, wanted = ([x for r in rows for x in r.sampling_logprobs] for rows in (ours, reference))
        torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), atol=1e-5, rtol=0)
    assert (len(caches) > 0) == (decoding == "fused")


def test_only_new_tokens_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = sampler_of(MODELS["qwen3"], max_batch_size=4)
    caches = RowCaches()
    request = SampleRequest(prompts=PROMPTS[:2], seeds=[0, 1], num_generations=2, caches=caches)
    rollouts = [rollout for group in sampler.sample(request) for rollout in group]
    contexts = [
        ids + rollout.completion_ids + (40, 41, 42)
        for ids, rollout in zip([PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, rollouts, strict=True)
    ]
    read: list[int] = []
    forward = FusedDecoder._forward

    def counted(self: FusedDecoder, tokens: torch.Tensor, masks: Any) -> torch.Tensor:
        read.append(tokens.shape[1])
        return forward(self, tokens, masks)

    assert [r.finish_reason for r in rollouts] == ["stop"] * 4
    monkeypatch.setattr(FusedDecoder, "_forward", counted)
    request = replace(request, prompts=contexts, seeds=range(4), num_generations=1)
    sampler.sample(request)
    # The last token of the turn has not been read by then.
    assert read[0] == 4
    assert set(read[1:]) == {1}


def test_no_more_rows_are_kept_than_are_decoded_at_once() -> None:
    sampler = sampler_of(MODELS["qwen3"], max_batch_size=4)
    caches = RowCaches()
    request = SampleRequest(prompts=PROMPTS, seeds=range(5), num_generations=2, caches=caches)
    sampler.sample(request)
    assert len(caches) == 4
    sampler.sample(replace(request, prompts=PROMPTS[:1], seeds=[0], num_generations=1))
    assert len(caches) <= 1, "the rows of the call before are not kept"


def cache(value: float, tokens: int) -> Cache:
    return Cache(torch.full((1, 1, tokens, 1), value), torch.full((1, 1, tokens, 1), value))


def test_the_longest_beginning_is_found() -> None:
    caches = RowCaches()
    rows: dict[TokenIds, float] = {(1, 2): 0.0, (1, 2, 3): 1.0, (1, 2, 4, 5): 2.0, (7,): 3.0}
    for ids, value in rows.items():
        caches.keep(ids, cache(value, 9))
    taken = caches.take_over()
    assert (len(caches), len(taken)) == (0, 4)
    found = taken.find((1, 2, 3, 4))
    assert found is not None
    assert found.keys.flatten().tolist() == [1.0, 1.0], "of all tokens but the last"
    assert taken.find((1, 3)) is None
    assert taken.find((2, 7)) is None
