"""Log-probabilities and hidden states of completions: against transformers' own, packed, padded and split."""

import pytest
import torch
from torch.testing import assert_close

from support.tiny import make_model
from uniapl.models.policy import Policy
from uniapl.models.reference import Reference, trained_weights
from uniapl.models.token_states import TokenReader, TokenStates
from uniapl.types import Tokens

PROMPT = (5, 9, 12)
SEQUENCES = [
    Tokens(PROMPT, (31, 4, 1)),
    Tokens(PROMPT, (44, 45, 46, 47, 1)),
    Tokens((8,), (20,)),
    Tokens((7, 7, 7, 7), (1,)),
]


def reader(family: str, *, layers: tuple[int, ...] = (1, 2), packed: bool = False, max_tokens: int = 1000):
    policy = Policy(make_model(family))
    return TokenReader(
        model=policy,
        layers=layers,
        temperature=0.7,
        pad_id=0,
        max_tokens=max_tokens,
        packed=packed and policy.packs,
        device=torch.device("cpu"),
    )


def assert_same(got: list[TokenStates], expected: list[TokenStates]) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        assert_close(mine.logprobs, theirs.logprobs, atol=1e-5, rtol=1e-5)
        assert_close(mine.states, theirs.states, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "llama", "mistral_sliding", "gemma2_softcap", "gpt2"])
@pytest.mark.parametrize("packed", [False, True])
def test_equal_to_transformers_states_of_each_token(family: str, packed: bool) -> None:
    model = make_model(family)
    found = reader(family, packed=packed).read(SEQUENCES)
    for states, (prompt, completion, _) in zip(found, SEQUENCES, strict=True):
        with torch.no_grad():
            output = model(torch.tensor([prompt + completion]), output_hidden_states=True)
        own = slice(len(prompt), None)
        # The last of transformers' states is normalized; the layer's own output is not returned.
        assert_close(states.states[:, :32], output.hidden_states[1][0, own], atol=1e-4, rtol=1e-4)
        logits = output.logits[0, len(prompt) - 1 : -1] / 0.7
        chosen = logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)
        assert_close(states.logprobs, chosen, atol=1e-4, rtol=1e-4)
        assert states.states.shape == (len(completion), 64)


def test_batches_padding_and_order_change_nothing() -> None:
    expected = reader("qwen3").read(SEQUENCES)
    assert_same(reader("qwen3", packed=True).read(SEQUENCES), expected)
    assert_same(reader("qwen3", max_tokens=1).read(SEQUENCES), expected)
    assert_same(reader("qwen3").read(SEQUENCES[::-1]), expected[::-1])


def test_given_tokens_are_read_and_have_no_states() -> None:
    whole = SEQUENCES[1]
    parts = [whole._replace(given=((1, 3),)), whole._replace(given=((0, 1), (4, 5)))]
    for packed in (False, True):
        (expected,) = reader("qwen3", packed=packed).read([whole])
        found = reader("qwen3", packed=packed).read(parts)
        for states, kept in zip(found, ([0, 3, 4], [1, 2, 3]), strict=True):
            assert_close(states.logprobs, expected.logprobs[kept], atol=1e-5, rtol=1e-5)
            assert_close(states.states, expected.states[kept], atol=1e-5, rtol=1e-5)


def test_a_layer_is_the_layer_s_own() -> None:
    both = reader("qwen3").read(SEQUENCES)
    second = reader("qwen3", layers=(2,)).read(SEQUENCES)
    none = reader("qwen3", layers=()).read(SEQUENCES)
    for pair, one, no in zip(both, second, none, strict=True):
        assert torch.equal(pair.states[:, 32:], one.states)
        assert not torch.equal(pair.states[:, :32], one.states)
        assert no.states.shape[1] == 0
        assert_close(no.logprobs, one.logprobs)


def test_states_are_the_reference_s_and_carry_no_gradient() -> None:
    policy = Policy(make_model("qwen3", seed=3))
    start = {name: tensor.clone() for name, tensor in trained_weights(policy).items()}
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05)
    common = {**vars(reader("qwen3", layers=(2,))), "packed": policy.packs, "temperature": 1.0}
    found = TokenReader(**{**common, "model": Reference(policy, start)}).read(SEQUENCES)
    at_start = Policy(make_model("qwen3", seed=3))
    expected = TokenReader(**{**common, "model": at_start}).read(SEQUENCES)
    assert_same(found, expected)
    assert not any(s.logprobs.requires_grad or s.states.requires_grad for s in found)
