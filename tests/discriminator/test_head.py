"""The head on reference states: padding, order, its start, and its loss against plain autograd."""

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.testing import assert_close

from uniapl.discriminator.head import StateHead, head_logits
from uniapl.models.token_states import TokenStates
from uniapl.training.update.head_step import head_step

SIZE = 6


def head(*, seed: int = 0, started: bool = True) -> StateHead:
    torch.manual_seed(seed)
    module = StateHead(SIZE)
    if started:
        torch.nn.init.normal_(module.out.weight)
    return module


def completions(*lengths: int, seed: int = 1) -> list[TokenStates]:
    generator = torch.Generator().manual_seed(seed)
    return [
        TokenStates(
            logprobs=-torch.rand(n, generator=generator), states=torch.randn(n, SIZE, generator=generator)
        )
        for n in lengths
    ]


def test_it_starts_undecided() -> None:
    assert head_logits(head(started=False), completions(3, 1, 5)).tolist() == [0.0, 0.0, 0.0]


def test_a_logit_does_not_depend_on_the_others_or_on_padding() -> None:
    module, items = head(), completions(3, 1, 5, 2)
    together = head_logits(module, items)
    alone = torch.cat([head_logits(module, [item]) for item in items])
    assert_close(together, alone, atol=1e-6, rtol=1e-6)
    assert_close(head_logits(module, items[::-1]), together.flip(0), atol=1e-6, rtol=1e-6)
    assert together.std() > 0.01


def test_padding_is_never_read() -> None:
    module, (item,) = head(), completions(2)
    poison = torch.full((1, 2, SIZE), 1e9)
    states = torch.cat([item.states[None], poison], dim=1)
    logprobs = torch.cat([item.logprobs[None], torch.full((1, 2), -1e9)], dim=1)
    mask = torch.tensor([[True, True, False, False]])
    assert_close(module(states, logprobs, mask), head_logits(module, [item]))


def test_the_log_probabilities_and_the_states_both_count() -> None:
    module, (item,) = head(), completions(4)
    base = head_logits(module, [item])
    other = TokenStates(logprobs=item.logprobs - 2, states=item.states)
    moved = TokenStates(logprobs=item.logprobs, states=item.states.flip(-1))
    assert (head_logits(module, [other]) - base).abs() > 1e-4
    assert (head_logits(module, [moved]) - base).abs() > 1e-4


def test_without_log_probabilities_only_the_states_count() -> None:
    torch.manual_seed(0)
    module, (item,) = StateHead(SIZE, log_probability_features=False), completions(4)
    torch.nn.init.normal_(module.out.weight)
    base = head_logits(module, [item])
    other = TokenStates(logprobs=item.logprobs - 2, states=item.states)
    moved = TokenStates(logprobs=item.logprobs, states=item.states.flip(-1))
    assert torch.equal(head_logits(module, [other]), base)
    assert (head_logits(module, [moved]) - base).abs() > 1e-4


def test_a_completion_without_text_has_a_finite_logit() -> None:
    logits = head_logits(head(), completions(0, 3))
    assert logits.isfinite().all()
    assert_close(logits[:1], head_logits(head(), completions(0)))


class KeepGradient(torch.optim.SGD):
    """Keeps the gradient of its step and changes nothing."""

    def step(self, closure: object = None) -> None:
        self.kept = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def stepped(module: StateHead, experts: list[TokenStates], negatives: list[TokenStates], max_tokens: int):
    optimizer = KeepGradient(module.parameters(), lr=1.0)
    loss, applied = head_step(
        Accelerator(cpu=True),
        module,
        optimizer,
        experts,
        negatives,
        counts={"expert": len(experts), "negative": len(negatives)},
        max_grad_norm=1e9,
        max_tokens=max_tokens,
    )
    assert applied
    return loss, optimizer.kept


@pytest.mark.parametrize("max_tokens", [1, 7, 1000])
def test_the_step_is_half_of_each_mean(max_tokens: int) -> None:
    """For every size of batches, and with more negatives than demonstrations."""
    experts, negatives = completions(3, 5), completions(2, 4, 1, 6, 3, seed=2)
    module = head()
    loss, gradients = stepped(module, experts, negatives, max_tokens)

    def mean(items: list[TokenStates], sign: float) -> Tensor:
        return torch.stack(
            [torch.log1p(torch.exp(-sign * head_logits(module, [item])[0])) for item in items]
        ).mean()

    expected = 0.5 * mean(experts, 1.0) + 0.5 * mean(negatives, -1.0)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    module.zero_grad()
    expected.backward()
    for mine, parameter in zip(gradients, module.parameters(), strict=True):
        assert parameter.grad is not None
        assert_close(mine, parameter.grad, atol=1e-6, rtol=1e-4)


def test_it_learns_to_tell_them_apart() -> None:
    module = head(started=False)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    experts = [TokenStates(logprobs=c.logprobs, states=c.states + 1) for c in completions(3, 4, 5)]
    negatives = completions(3, 4, 5, seed=5)
    for _ in range(40):
        head_step(
            Accelerator(cpu=True),
            module,
            optimizer,
            experts,
            negatives,
            counts={"expert": 3, "negative": 3},
            max_grad_norm=1.0,
            max_tokens=100,
        )
    assert head_logits(module, experts).min() > 1
    assert head_logits(module, negatives).max() < -1
