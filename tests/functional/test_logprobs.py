"""Chunked log-probabilities against the full logits, a plain-Python reference, and finite differences."""

import math

import pytest
import torch
from torch.testing import assert_close

from support import reference
from uniapl.functional import logprobs_from_logits, selected_logprobs


def make(n: int = 11, d: int = 5, v: int = 17, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "hidden": torch.randn(n, d, dtype=dtype),
        "weight": torch.randn(v, d, dtype=dtype),
        "bias": torch.randn(v, dtype=dtype),
        "token_ids": torch.randint(0, v, (n,)),
        # Rollouts at 0.7 beside demonstrations at 1, as a mixed batch has them.
        "temperature": torch.where(torch.arange(n) % 2 == 0, 0.7, 1.0).to(dtype),
    }


def test_two_tokens_by_hand() -> None:
    # logits (1 * ln 3, 0): softmax = (3/4, 1/4); at temperature 0.5 the odds are squared: (9/10, 1/10).
    hidden = torch.tensor([[math.log(3.0)], [math.log(3.0)]], dtype=torch.float64)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    logprobs, entropy = selected_logprobs(
        hidden, weight, torch.tensor([0, 1]), torch.tensor([1.0, 0.5], dtype=torch.float64)
    )
    assert_close(logprobs.exp(), torch.tensor([0.75, 0.1], dtype=torch.float64))
    expected = [
        -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)),
        -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)),
    ]
    assert_close(entropy, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 11, 1000, None])
@pytest.mark.parametrize("with_bias", [True, False])
def test_chunks_equal_the_full_computation(chunk_size: int | None, with_bias: bool) -> None:
    x = make()
    bias = x["bias"] if with_bias else None
    leaves = [t.requires_grad_() for t in (x["hidden"], x["weight"], bias) if t is not None]
    logits = x["hidden"] @ x["weight"].T + (x["bias"] if with_bias else 0.0)
    full, full_entropy = logprobs_from_logits(logits, x["token_ids"], x["temperature"])
    upstream = torch.randn(len(full), dtype=full.dtype)
    expected = torch.autograd.grad((full * upstream).sum(), leaves)

    logprobs, entropy = selected_logprobs(
        x["hidden"], x["weight"], x["token_ids"], x["temperature"], bias=bias, chunk_size=chunk_size
    )
    grads = torch.autograd.grad((logprobs * upstream).sum(), leaves)
    assert_close(logprobs, full)
    assert_close(entropy, full_entropy)
    for got, want in zip(grads, expected, strict=True):
        assert_close(got, want)
    assert not entropy.requires_grad


def test_full_computation_equals_plain_python() -> None:
    x = make(n=4)
    logits = x["hidden"] @ x["weight"].T
    logprobs, entropy = logprobs_from_logits(logits, x["token_ids"], x["temperature"])
    for row in range(4):
        temperature = float(x["temperature"][row])
        expected = reference.log_softmax(logits[row].tolist(), temperature)[int(x["token_ids"][row])]
        assert math.isclose(float(logprobs[row]), expected, rel_tol=1e-12)
        assert math.isclose(
            float(entropy[row]), reference.entropy(logits[row].tolist(), temperature), rel_tol=1e-9
        )


def test_gradient_against_finite_differences() -> None:
    x = make(n=5, d=3, v=6)

    def logprobs(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return selected_logprobs(hidden, weight, x["token_ids"], x["temperature"], bias=bias, chunk_size=2)[0]

    inputs = tuple(x[name].requires_grad_() for name in ("hidden", "weight", "bias"))
    assert torch.autograd.gradcheck(logprobs, inputs)


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], requires_grad=True)
    logprobs, entropy = selected_logprobs(hidden, weight, torch.tensor([1, 1]), torch.ones(2))
    logprobs.sum().backward()
    assert_close(logprobs, torch.tensor([-1e4, 0.0]))
    assert entropy.isfinite().all()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_no_rows_give_zero_gradients_that_are_there() -> None:
    weight = torch.randn(7, 3, requires_grad=True)
    logprobs, _ = selected_logprobs(
        torch.zeros(0, 3, requires_grad=True), weight, torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    )
    logprobs.sum().backward()
    assert weight.grad is not None
    assert_close(weight.grad, torch.zeros(7, 3))


def test_bf16_weight_gradient_is_summed_in_fp32() -> None:
    # 4,096 equal contributions of 1/256: bf16 would stop growing at 256 of them, far from the sum.
    n = 4096
    hidden = torch.ones(n, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    logprobs, _ = selected_logprobs(
        hidden, weight, torch.zeros(n, dtype=torch.int64), torch.ones(n), chunk_size=1
    )
    (logprobs.sum() / 128).backward()
    assert weight.grad is not None
    assert_close(weight.grad.float(), torch.tensor([[16.0], [-16.0]]))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(Exception, match=r"(?i)type-check|shape|violat"):
        selected_logprobs(torch.zeros(3, 2), torch.zeros(5, 4), torch.zeros(3).long(), torch.ones(3))


@pytest.mark.parametrize("chunk_size", [1, 3, None])
def test_the_entropy_s_gradient_is_that_of_the_full_computation(chunk_size: int | None) -> None:
    x = make()
    leaves = [x[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    logits = x["hidden"] @ x["weight"].T + x["bias"]
    full, full_entropy = logprobs_from_logits(logits, x["token_ids"], x["temperature"], entropy_gradient=True)
    upstream = torch.randn(2, len(full), dtype=full.dtype)
    expected = torch.autograd.grad((full * upstream[0] + full_entropy * upstream[1]).sum(), leaves)
    logprobs, entropy = selected_logprobs(
        *(x[name] for name in ("hidden", "weight", "token_ids", "temperature")),
        bias=x["bias"],
        chunk_size=chunk_size,
        entropy_gradient=True,
    )
    grads = torch.autograd.grad((logprobs * upstream[0] + entropy * upstream[1]).sum(), leaves)
    assert_close(entropy, full_entropy)
    for got, want in zip(grads, expected, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_the_entropy_s_gradient_against_finite_differences(chunk_size: int) -> None:
    x = make(n=5, d=3, v=6)

    def entropy(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return selected_logprobs(
            hidden,
            weight,
            x["token_ids"],
            x["temperature"],
            bias=bias,
            chunk_size=chunk_size,
            entropy_gradient=True,
        )[1]

    assert torch.autograd.gradcheck(
        entropy, tuple(x[n].requires_grad_() for n in ("hidden", "weight", "bias"))
    )


@pytest.mark.parametrize("chunk_size", [1, None])
def test_the_entropy_s_gradient_stays_finite_where_a_probability_is_zero(chunk_size: int | None) -> None:
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], requires_grad=True)
    options = {"chunk_size": chunk_size, "entropy_gradient": True}
    _, entropy = selected_logprobs(hidden, weight, torch.tensor([1, 1]), torch.ones(2), **options)
    entropy.sum().backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, torch.zeros(2, 1))
