"""The fused decoder beside the model's own forward: the same tokens, the same log-probabilities."""

from copy import deepcopy
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

import uniapl.rollout.local as local
from support.tiny import CONFIGS, SMALL, VOCABULARY, make_model
from uniapl.rollout.fused import same_logits, supports_fused
from uniapl.rollout.local import LocalSampler, close_ranks, inverse_cdf
from uniapl.types import Rollout

PROMPTS = [(5, 6, 7), (9,), (11, 12, 13, 14, 15, 16, 17), (20, 21), (30, 31, 32)]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
FITTING: dict[str, PretrainedConfig] = {
    "qwen3, tied, two queries a key": Qwen3Config(**SMALL, tie_word_embeddings=True),
    "qwen3, untied, a key each": Qwen3Config(**SMALL | {"num_key_value_heads": 4}, tie_word_embeddings=False),
    "qwen2, four queries a key": Qwen2Config(**SMALL | {"num_key_value_heads": 1}, tie_word_embeddings=True),
    "qwen2, a window in one layer": Qwen2Config(**SMALL, **WINDOWS),
    "llama, scaled positions": LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "llama, every bias": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "mistral, a window": MistralConfig(**SMALL, sliding_window=4),
    "mistral, no window": MistralConfig(**SMALL, sliding_window=None),
}


def model_of(config: PretrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """A random model, its biases and norms random too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter)) if parameter.dim() == 1 else parameter.mul_(3)
    return model


def sample(model: PreTrainedModel, decoding: str, **settings: Any) -> list[Rollout]:
    defaults: dict[str, Any] = {"stop_ids": {1, 2, 3}, "pad_id": 0, "max_completion_length": 14}
    sampler = LocalSampler(model=model, decoding=decoding, **defaults | settings)  # type: ignore[arg-type]
    assert sampler.fused == (decoding == "fused")
    groups = sampler.sample(PROMPTS, seeds=range(5), num_generations=4, policy_version=0)
    return [rollout for group in groups for rollout in group]


def assert_same(ours: list[Rollout], reference: list[Rollout], *, atol: float = 1e-5) -> None:
    assert [r.completion_ids for r in ours] == [r.completion_ids for r in reference]
    assert [r.finish_reason for r in ours] == [r.finish_reason for r in reference]
    got, expected = ([x for r in rollouts for x in r.sampling_logprobs] for rollouts in (ours, reference))
    assert_close(torch.tensor(got), torch.tensor(expected), atol=atol, rtol=0)


@pytest.mark.parametrize("name", FITTING)
def test_it_samples_what_the_model_s_own_forward_samples(name: str) -> None:
    model = model_of(FITTING[name])
    ours = sample(model, "fused")
    assert len({len(rollout.completion_ids) for rollout in ours}) > 4, "rows leave at many positions"
    assert_same(ours, sample(model, "plain"))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 0.6, "top_k": 5},
        {"top_p": 0.7},
        {"max_batch_size": 8},
        {"max_batch_size": 1},
    ],
    ids=str,
)
def test_it_does_so_however_tokens_are_chosen(settings: dict[str, Any]) -> None:
    model = model_of(FITTING["qwen3, tied, two queries a key"])
    assert_same(sample(model, "fused", **settings), sample(model, "plain", **settings))


def test_it_reads_the_weights_of_the_moment() -> None:
    model = model_of(FITTING["qwen2, four queries a key"])
    defaults: dict[str, Any] = {"stop_ids": {1}, "pad_id": 0, "max_completion_length": 6}
    sampler = LocalSampler(model=model, **defaults)
    before = sampler.sample(PROMPTS, seeds=range(5), num_generations=2, policy_version=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    after = sampler.sample(PROMPTS, seeds=range(5), num_generations=2, policy_version=1)
    plain = LocalSampler(model=model, decoding="plain", **defaults)
    reference = plain.sample(PROMPTS, seeds=range(5), num_generations=2, policy_version=1)
    assert before != after
    assert_same([r for g in after for r in g], [r for g in reference for r in g])


def test_the_model_is_left_as_it_was() -> None:
    model = model_of(FITTING["llama, every bias"]).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sample(model, "fused")
    assert model.training
    assert all(p.grad is None and p.requires_grad and not p.is_inference() for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_under_autocast_it_is_as_near_as_bf16_allows() -> None:
    model = model_of(FITTING["qwen3, tied, two queries a key"])

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    ours, reference = (
        sample(model, decoding, temperature=0.0, max_completion_length=1, autocast=autocast)
        for decoding in ("fused", "plain")
    )
    assert_same(ours, reference, atol=0.1)
    exact = sample(model, "plain", temperature=0.0, max_completion_length=1)
    assert [r.sampling_logprobs for r in ours] != [r.sampling_logprobs for r in exact]


def test_a_model_in_bf16() -> None:
    model = model_of(FITTING["llama, scaled positions"]).to(torch.bfloat16)
    settings: dict[str, Any] = {"temperature": 0.0, "max_completion_length": 1}
    assert_same(sample(model, "fused", **settings), sample(model, "plain", **settings), atol=0.1)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_which_families_fit(family: str) -> None:
    assert supports_fused(make_model(family)) == (family in ("qwen3", "llama", "mistral_sliding"))


def odd_linear(model: Any) -> None:
    class Scaled(nn.Linear):
        pass

    model.model.layers[1].mlp.up_proj.__class__ = Scaled


def another_norm(model: Any) -> None:
    model.model.layers[0].mlp.norm = nn.LayerNorm(8)


def one_head_norm(model: Any) -> None:
    model.model.layers[0].self_attn.k_norm = nn.Identity()


def dynamic_positions(model: Any) -> None:
    model.model.rotary_emb.rope_type = "dynamic"


def chunked_layer(model: Any) -> None:
    model.config.layer_types = ["full_attention", "chunked_attention"]


@pytest.mark.parametrize(
    "change",
    [odd_linear, another_norm, one_head_norm, dynamic_positions, chunked_layer],
    ids=lambda f: f.__name__,
)
def test_what_is_not_known_does_not_fit(change: Any) -> None:
    model = model_of(FITTING["qwen3, tied, two queries a key"])
    assert supports_fused(model)
    change(model)
    assert not supports_fused(model)


def test_a_window_that_the_model_does_not_keep_to() -> None:
    """Llama reads all tokens whatever its configuration says; longer than the probe, it would not show."""
    ignored = LlamaConfig(**SMALL, sliding_window=16)
    assert not same_logits(model_of(ignored))
    assert ignored.sliding_window == 16
    kept = model_of(MistralConfig(**SMALL, sliding_window=16))
    assert same_logits(kept)
    assert kept.config.sliding_window == 16


def test_what_only_the_numbers_show_is_refused() -> None:
    """A patched attention: same parts, other arithmetic. The sampler then does what the model does."""
    model: Any = model_of(FITTING["qwen3, tied, two queries a key"])
    assert same_logits(model)
    attention = model.model.layers[1].self_attn
    own = type(attention).forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output, weights = own(self, *args, **kwargs)
        return 2 * output, weights

    attention.forward = MethodType(doubled, attention)
    assert supports_fused(model)
    assert not same_logits(model)
    settings: dict[str, Any] = {"stop_ids": {1}, "pad_id": 0, "max_completion_length": 4}
    patched = LocalSampler(model=model, **settings)
    patched.check()
    assert not patched.fused
    reference = LocalSampler(model=model, decoding="plain", **settings)
    asked: dict[str, Any] = {"seeds": range(5), "num_generations": 2, "policy_version": 0}
    assert patched.sample(PROMPTS, **asked) == reference.sample(PROMPTS, **asked)


def test_rows_that_ended_between_two_looks_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(FITTING["mistral, a window"])
    reference = sample(model, "plain")
    monkeypatch.setitem(local.LOOK_EVERY, "cpu", 5)
    for decoding in ("fused", "plain"):
        assert_same(sample(model, decoding), reference)


def test_ranks_are_closed_by_the_last_rows() -> None:
    finished = torch.tensor([False, True, False, True, False, False])
    assert close_ranks(finished).tolist() == [0, 4, 2, 5]
    assert close_ranks(torch.tensor([False, False, True])).tolist() == [0, 1]
    assert close_ranks(torch.ones(3, dtype=torch.bool)).tolist() == []


@pytest.mark.parametrize("size", [VOCABULARY, 256, 257, 1000, 5120])
def test_draws_by_blocks_are_draws_by_single_tokens(size: int) -> None:
    """Against the whole cumulative sum in fp64, at the masses' edges and between them."""
    generator = torch.Generator().manual_seed(size)
    probs = torch.randn(200, size, generator=generator).mul(4).exp()
    probs[torch.rand(200, size, generator=generator) < 0.3] = 0.0
    uniforms = torch.rand(200, dtype=torch.float64, generator=generator)
    cumulative = probs.double().cumsum(-1)
    expected = torch.searchsorted(cumulative, uniforms.unsqueeze(-1) * cumulative[:, -1:], right=True)
    assert torch.equal(inverse_cdf(probs, uniforms), expected.squeeze(-1))
    last = (probs > 0).long().mul(torch.arange(size)).amax(-1)
    assert torch.equal(inverse_cdf(probs, torch.full((200,), 1 - 2**-53, dtype=torch.float64)), last)
    assert torch.equal(
        inverse_cdf(probs, torch.zeros(200, dtype=torch.float64)), (probs > 0).long().argmax(-1)
    )


def test_probabilities_that_are_no_numbers_give_some_token() -> None:
    for size in (VOCABULARY, 300):
        tokens = inverse_cdf(torch.full((2, size), torch.nan), torch.tensor([0.2, 0.9], dtype=torch.float64))
        assert ((tokens >= 0) & (tokens < size)).all()
