"""The model's own decoding: the cache under autocast, and the synchronizations of every token."""

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from support.sampling import local_sampler
from support.tiny import make_model
from uniapl.rollout import SampleRequest
from uniapl.rollout.plain import PlainDecoder

PROMPTS = [(5, 6, 7), (9, 10, 11, 12)]


def decode(model: Any, dtype: torch.dtype | None) -> tuple[list[torch.Tensor], PlainDecoder]:
    """The logits of two prompts with two rows each, and of four tokens after them."""
    decoder = PlainDecoder(model, 0, PROMPTS, 2)
    context = torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext()
    with torch.inference_mode(), context:
        logits = [decoder.prefill()]
        for token in (3, 4, 5, 6):
            logits.append(decoder.step(torch.full((4,), token)))
    return logits, decoder


@pytest.mark.parametrize("family", ["gemma2_softcap", "llama", "qwen3"])
def test_the_cache_has_the_precision_of_autocast(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits are bit for bit those of the model's own cache, which takes up to twice the memory."""
    model = make_model(family)
    logits, decoder = decode(model, torch.bfloat16)
    assert decoder.cache is not None
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.float32)
    expected, reference = decode(model, torch.bfloat16)
    assert reference.cache is not None
    assert all(torch.equal(one, other) for one, other in zip(logits, expected, strict=True))
    assert {layer.keys.dtype for layer in reference.cache.layers} == {torch.float32}
    for layer in decoder.cache.layers:
        assert layer.keys.dtype == layer.values.dtype == torch.bfloat16


def test_without_autocast_the_cache_is_the_models() -> None:
    _, decoder = decode(make_model("llama"), None)
    assert decoder.cache is not None
    assert {layer.keys.dtype for layer in decoder.cache.layers} == {torch.float32}


class Synchronizations(TorchDispatchMode):
    """Counts the operations whose result the processor has to wait for on a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.WAITING:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def synchronizations(decoding: str, tokens: int, **settings: Any) -> int:
    # No token of the vocabulary ends a row, so that every row has all tokens.
    sampler = local_sampler(
        model=make_model("qwen3"),
        stop_ids={10**6},
        pad_id=0,
        max_completion_length=tokens,
        decoding=decoding,  # type: ignore[arg-type]
        **settings,
    )
    assert sampler.fused == (decoding == "fused")
    with Synchronizations() as mode:
        sampler.sample(SampleRequest(prompts=PROMPTS, seeds=[0, 1], num_generations=2))
    return mode.found.total()


@pytest.mark.parametrize("settings", [{}, {"top_k": 5, "top_p": 0.9}, {"temperature": 0.0}], ids=str)
def test_fused_decoding_waits_for_a_gpu_only_at_its_checks(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """One synchronization every eight tokens, which finds the finished rows."""
    monkeypatch.setattr("uniapl.rollout.local.CHECK_EVERY", {"cpu": 8, "cuda": 8})
    few, many = (synchronizations("fused", tokens, **settings) for tokens in (9, 41))
    assert many - few == 4
