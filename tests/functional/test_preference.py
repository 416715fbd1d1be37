"""The loss on preference pairs: by hand, against plain Python, by finite differences, NaN outside."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from uniapl.functional import implicit_rewards, preference_loss


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loss_of(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, chosen: Tensor, *, beta: float = 0.1
) -> Tensor:
    return preference_loss(*implicit_rewards(logprobs, ref_logprobs, mask, chosen, beta=beta))


def test_by_hand() -> None:
    # Row 2 is chosen; rows 0 and 1 are rejected for it; row 3 is in no pair. Log-ratios: -1, 2, 3.
    logprobs = tensor([[-2.0, -3.0], [-1.0, math.nan], [-1.0, -1.0], [-7.0, -7.0]]).requires_grad_()
    reference = tensor([[-2.0, -2.0], [-3.0, math.nan], [-3.0, -2.0], [math.nan, math.inf]])
    mask = torch.tensor([[True, True], [True, False], [True, True], [False, False]])
    pairs = torch.tensor([2, 2, -1, -1])
    better, worse = implicit_rewards(logprobs, reference, mask, pairs, beta=0.5)
    assert better.tolist() == [1.5, 1.5]
    assert worse.tolist() == [-0.5, 1.0]
    loss = loss_of(logprobs, reference, mask, pairs, beta=0.5)
    # Margins 2 and 0.5.
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-0.5)))
    loss.backward()
    first, second = (0.5 / (1 + math.exp(margin)) for margin in (2.0, 0.5))
    chosen = -(first + second)
    assert_close(logprobs.grad, tensor([[first, first], [second, 0.0], [chosen, chosen], [0.0, 0.0]]))


def test_equal_policies_give_log_2_for_each_pair() -> None:
    logprobs = torch.randn(4, 3)
    loss = loss_of(logprobs, logprobs, torch.ones(4, 3).bool(), torch.tensor([-1, 0, 0, -1]))
    assert float(loss) == pytest.approx(2 * math.log(2))


def test_equals_plain_python() -> None:
    torch.manual_seed(0)
    logprobs, reference = torch.randn(6, 5), torch.randn(6, 5)
    mask = torch.rand(6, 5) < 0.6
    pairs = [4, -1, 5, 4, -1, -1]
    expected = 0.0
    for rejected, chosen in enumerate(pairs):
        if chosen < 0:
            continue
        margin = 0.0
        for row, sign in ((chosen, 1), (rejected, -1)):
            for t in range(5):
                if mask[row, t]:
                    margin += sign * (float(logprobs[row, t]) - float(reference[row, t]))
        expected += math.log(1 + math.exp(-0.3 * margin))
    found = loss_of(logprobs, reference, mask, torch.tensor(pairs), beta=0.3)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_gradients() -> None:
    torch.manual_seed(1)
    reference = torch.randn(4, 3, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [False, True, True], [True, True, True], [True, False, False]])
    pairs = torch.tensor([3, 3, -1, -1])
    logprobs = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: loss_of(x, reference, mask, pairs, beta=0.7), logprobs)


def test_without_pairs_it_is_a_differentiable_zero() -> None:
    logprobs = torch.randn(2, 3, requires_grad=True)
    loss = loss_of(logprobs, torch.zeros(2, 3), torch.zeros(2, 3).bool(), torch.tensor([-1, -1]))
    loss.backward()
    assert float(loss) == 0
    assert logprobs.grad is not None
    assert not logprobs.grad.any()


def test_a_large_margin_stays_finite() -> None:
    logprobs = torch.tensor([[-2000.0], [0.0]], requires_grad=True)
    mask, pairs = torch.ones(2, 1).bool(), torch.tensor([1, -1])
    assert loss_of(logprobs, torch.zeros(2, 1), mask, pairs, beta=1.0).item() == 0
    loss = loss_of(logprobs, torch.zeros(2, 1), mask, torch.tensor([-1, 0]), beta=1.0)
    loss.backward()
    assert float(loss) == pytest.approx(2000.0)
    assert logprobs.grad is not None
    assert bool(logprobs.grad.isfinite().all())
