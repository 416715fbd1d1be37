"""The KL to a teacher: by hand, against plain Python and the full KL, by finite differences, NaN outside."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from uniapl.functional import (
    logprobs_from_logits,
    sampled_reverse_kl,
    selected_logprobs,
    top_k_reverse_kl,
    top_logprobs,
)


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_sampled_form_by_hand() -> None:
    logprobs = tensor([[-1.0, -2.0, -9.0]]).requires_grad_()
    old = tensor([[-1.0, -2.5, -9.0]])
    teacher = tensor([[-3.0, -1.0, math.nan]])
    mask = torch.tensor([[True, True, False]])
    loss = sampled_reverse_kl(logprobs, old, teacher, mask)
    ratio = math.exp(0.5)
    assert float(loss) == pytest.approx(2.0 - ratio)
    loss.backward()
    # rho * difference: the policy's token that the teacher finds less likely is lowered.
    assert_close(logprobs.grad, tensor([[2.0, -ratio, 0.0]]))
    weights = tensor([[0.5, 0.25, 9.0]])
    assert float(sampled_reverse_kl(logprobs, old, teacher, mask, weights=weights)) == pytest.approx(
        1.0 - 0.25 * ratio
    )


def test_the_sampled_gradient_is_on_average_that_of_the_kl() -> None:
    """The mean over all tokens, weighted with the policy's probabilities, is the gradient of the full KL."""
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(7, dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    (expected,) = torch.autograd.grad((logp.exp() * (logp - teacher)).sum(), logits, retain_graph=True)
    terms = [
        float(logp[v].exp().detach())
        * sampled_reverse_kl(
            logp[v].view(1, 1), logp[v].detach().view(1, 1), teacher[v].view(1, 1), torch.ones(1, 1).bool()
        )
        for v in range(7)
    ]
    (found,) = torch.autograd.grad(torch.stack(terms).sum(), logits)
    assert_close(found, expected)


def test_top_k_by_hand() -> None:
    # Policy .5, .2 and .3 on all others; teacher .4, .4 and .2.
    logprobs = tensor([[[0.5, 0.2], [0.9, 0.1]]]).log().requires_grad_()
    teacher = tensor([[[0.4, 0.4], [math.nan, math.nan]]]).log()
    mask = torch.tensor([[True, False]])
    loss = top_k_reverse_kl(logprobs, teacher, mask)
    expected = 0.5 * math.log(0.5 / 0.4) + 0.2 * math.log(0.2 / 0.4) + 0.3 * math.log(0.3 / 0.2)
    assert float(loss) == pytest.approx(expected)
    loss.backward()
    # d/d log p_k of the sum: p_k (log p_k/q_k - log p_rest/q_rest).
    by_hand = [0.5 * (math.log(1.25) - math.log(1.5)), 0.2 * (math.log(0.5) - math.log(1.5))]
    assert logprobs.grad is not None
    assert_close(logprobs.grad, tensor([[by_hand, [0.0, 0.0]]]))
    weights = tensor([[0.5, math.nan]])
    assert float(top_k_reverse_kl(logprobs, teacher, mask, weights=weights)) == pytest.approx(expected / 2)


def _full_kl(policy: Tensor, teacher: Tensor) -> float:
    return float((policy.exp() * (policy - teacher)).sum())


def test_top_k_never_exceeds_the_full_kl_grows_with_k_and_ends_there() -> None:
    torch.manual_seed(3)
    policy, teacher = (torch.randn(1, 4, 9, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    mask = torch.ones(1, 4).bool()
    order = teacher.argsort(-1, descending=True)
    values = [
        float(top_k_reverse_kl(policy.gather(-1, ids), teacher.gather(-1, ids), mask))
        for ids in (order[..., :k] for k in range(1, 10))
    ]
    assert values == sorted(values)
    assert values[0] > 0
    assert values[-1] == pytest.approx(_full_kl(policy, teacher), rel=1e-9)
    assert values[-2] == pytest.approx(_full_kl(policy, teacher), rel=1e-9)  # one other token


@pytest.mark.parametrize("form", ["sampled", "top_k"])
def test_gradients(form: str) -> None:
    torch.manual_seed(1)
    full = torch.randn(2, 3, 6, dtype=torch.float64)
    teacher = torch.randn(2, 3, 6, dtype=torch.float64).log_softmax(-1)[..., :2]
    mask = torch.tensor([[True, True, False], [False, True, True]])
    old = full.log_softmax(-1)[..., 0] + 0.1

    def loss(logits: Tensor) -> Tensor:
        logprobs = logits.log_softmax(-1)[..., :2]
        if form == "top_k":
            return top_k_reverse_kl(logprobs, teacher, mask)
        # Its difference carries no gradient, so that finite differences need a fixed one: the value is linear
        # in the ratio.
        fixed = teacher[..., 0] - full.log_softmax(-1)[..., 0] + logprobs[..., 0].detach()
        return sampled_reverse_kl(logprobs[..., 0], old, fixed, mask)

    torch.autograd.gradcheck(loss, full.clone().requires_grad_())


def test_a_certain_policy_and_a_certain_teacher_stay_finite() -> None:
    logprobs = torch.tensor([[[0.0, -80.0]]], requires_grad=True)
    loss = top_k_reverse_kl(logprobs, torch.tensor([[[-80.0, 0.0]]]), torch.ones(1, 1).bool())
    loss.backward()
    assert float(loss) == pytest.approx(80.0, rel=1e-3)
    assert logprobs.grad is not None
    assert bool(logprobs.grad.isfinite().all())


@pytest.mark.parametrize("chunk_size", [1, 2, None])
def test_log_probabilities_of_several_tokens_per_row(chunk_size: int | None) -> None:
    torch.manual_seed(2)
    hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True)
    # A token that appears twice in a row gets the sum of its gradients.
    ids = torch.tensor([[0, 1, 1], [7, 2, 3], [4, 4, 4], [5, 0, 6], [1, 2, 3]])
    temperature = tensor([1.0, 0.7, 1.3, 1.0, 2.0])
    factors = torch.randn(5, 3, dtype=torch.float64)
    full, _ = logprobs_from_logits(hidden @ weight.T + bias, ids, temperature)
    expected = torch.autograd.grad((full * factors).sum(), (hidden, weight, bias))
    found, _ = selected_logprobs(hidden, weight, ids, temperature, bias=bias, chunk_size=chunk_size)
    assert_close(found, full)
    assert_close(torch.autograd.grad((found * factors).sum(), (hidden, weight, bias)), expected)


def test_the_most_likely_tokens_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uniapl.functional.logprobs.CHUNK_LOGITS", 16)
    torch.manual_seed(2)
    hidden, weight = torch.randn(5, 3, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    bias, temperature = torch.randn(8, dtype=torch.float64), tensor([1.0, 0.7, 1.3, 1.0, 2.0])
    ids, logprobs = top_logprobs(hidden, weight, temperature, k=3, bias=bias)
    full = ((hidden @ weight.T + bias) / temperature.unsqueeze(-1)).log_softmax(-1)
    for row in range(5):
        order = sorted(range(8), key=lambda v: -float(full[row, v]))[:3]
        assert ids[row].tolist() == order
        assert_close(logprobs[row], full[row, order])
