"""The fused decoder gives the same tokens and log-probabilities as the model's own forward pass."""

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
from support.sampling import local_sampler
from support.tiny import CONFIGS, SMALL, VOCABULARY, make_model
from uniapl.rollout import SampleRequest
from uniapl.rollout.fused import same_logits, supports_fused
from uniapl.rollout.local import inverse_cdf, unfinished_rows
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


def request(num_generations: int) -> SampleRequest:
    return SampleRequest(prompts=PROMPTS, seeds=range(5), num_generations=num_generations)


def model_of(config: PretrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """A random model with random biases and norms."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter)) if parameter.dim() == 1 else parameter.mul_(3)
    return model


def sample(model: PreTrainedModel, decoding: str, **settings: Any) -> list[Rollout]:
    defaults: dict[str, Any] = {"stop_ids": {1, 2, 3}, "pad_id": 0, "max_completion_length": 14}
    sampler = local_sampler(model=model, decoding=decoding, **defaults | settings)  # type: ignore[arg-type]
    assert sampler.fused == (decoding == "fused")
    groups = sampler.sample(request(4))
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
def test_it_samples_the_same_with_every_way_to_choose_tokens(settings: dict[str, Any]) -> None:
    model = model_of(FITTING["qwen3, tied, two queries a key"])
    assert_same(sample(model, "fused", **settings), sample(model, "plain", **settings))


def test_it_uses_the_current_weights() -> None:
    model = model_of(FITTING["qwen2, four queries a key"])
    defaults: dict[str, Any] = {"stop_ids": {1}, "pad_id": 0, "max_completion_length": 6}
    sampler = local_sampler(model=model, **defaults)
    before = sampler.sample(request(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    after = sampler.sample(request(2))
    plain = local_sampler(model=model, decoding="plain", **defaults)
    reference = plain.sample(request(2))
    assert before != after
    assert_same([r for g in after for r in g], [r for g in reference for r in g])


def test_sampling_does_not_change_the_model() -> None:
    model = model_of(FITTING["llama, every bias"]).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sample(model, "fused")
    assert model.training
    assert all(p.grad is None and p.requires_grad and not p.is_inference() for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_under_autocast_it_agrees_within_the_precision_of_bf16() -> None:
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
def test_supported_families(family: str) -> None:
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
def test_unknown_parts_are_not_supported(change: Any) -> None:
    model = model_of(FITTING["qwen3, tied, two queries a key"])
    assert supports_fused(model)
    change(model)
    assert not supports_fused(model)


def test_a_window_that_the_model_ignores() -> None:
    """Llama ignores a configured window; one longer than the compared sequences would not show."""
    ignored = LlamaConfig(**SMALL, sliding_window=16)
    assert not same_logits(model_of(ignored))
    assert ignored.sliding_window == 16
    kept = model_of(MistralConfig(**SMALL, sliding_window=16))
    assert same_logits(kept)
    assert kept.config.sliding_window == 16


def test_other_arithmetic_with_the_same_parameters_is_refused() -> None:
    """A patched attention has the same parameters and other arithmetic: the sampler uses the model itself."""
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
    patched = local_sampler(model=model, **settings)
    patched.check()
    assert not patched.fused
    reference = local_sampler(model=model, decoding="plain", **settings)
    assert patched.sample(request(2)) == reference.sample(request(2))


def test_tokens_after_the_end_of_a_row_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(FITTING["mistral, a window"])
    reference = sample(model, "plain")
    monkeypatch.setitem(local.CHECK_EVERY, "cpu", 5)
    for decoding in ("fused", "plain"):
        assert_same(sample(model, decoding), reference)


def test_the_last_rows_fill_the_gaps() -> None:
    finished = torch.tensor([False, True, False, True, False, False])
    assert unfinished_rows(finished).tolist() == [0, 4, 2, 5]
    assert unfinished_rows(torch.tensor([False, False, True])).tolist() == [0, 1]
    assert unfinished_rows(torch.ones(3, dtype=torch.bool)).tolist() == []


@pytest.mark.parametrize("size", [VOCABULARY, 256, 257, 1000, 5120])
def test_draws_by_blocks_equal_draws_by_single_tokens(size: int) -> None:
    """Against the cumulative sum over all tokens in fp64, at the edges of the masses and between them."""
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


def test_nan_probabilities_give_a_valid_token() -> None:
    for size in (VOCABULARY, 300):
        tokens = inverse_cdf(torch.full((2, size), torch.nan), torch.tensor([0.2, 0.9], dtype=torch.float64))
        assert ((tokens >= 0) & (tokens < size)).all()
