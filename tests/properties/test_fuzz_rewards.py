"""Any return value or exception of a reward function gives a finite value or a counted failure."""

import math
from collections.abc import Callable
from typing import Any

import numpy
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from support.fuzzing import ODD_NUMBERS, scalars, texts, tries
from uniapl.rewards.base import Rewarder, named_reward
from uniapl.types import Example

COUNT = 3
EXAMPLES = [
    Example(
        row=n, prompt="say a", prompt_ids=(4,), demonstration=None, demonstration_ids=None, columns={"n": n}
    )
    for n in range(1, COUNT + 1)
]


class Odd:
    """An object whose every conversion fails."""

    def __float__(self) -> float:
        raise RuntimeError("no number")

    def __repr__(self) -> str:
        raise RuntimeError("no text")


def raises(error: BaseException) -> Any:
    raise error


def generator(values: list[Any]) -> Any:
    yield from values
    raise RuntimeError("after the last")


async def awaited(values: Any) -> Any:
    return values


errors = st.sampled_from(
    [
        ValueError(),
        KeyError("n"),
        RuntimeError("\ud800"),
        TimeoutError(),
        StopIteration(),
        SystemExit(1),
        RecursionError(),
    ]
)
values = st.one_of(
    st.floats(),
    st.sampled_from(ODD_NUMBERS),
    scalars,
    errors,
    st.builds(Odd),
    st.just(object),
    st.lists(st.floats(), max_size=2),
    st.builds(complex),
    st.binary(max_size=3),
    st.floats(width=32).map(numpy.float32),
    st.floats().map(torch.tensor),
    st.lists(st.floats(), max_size=2).map(torch.tensor),
    st.lists(st.floats(), max_size=2).map(numpy.array),
    st.just(torch.tensor([1.0], requires_grad=True)[0]),
)
lists = st.lists(values, min_size=COUNT, max_size=COUNT) | st.lists(values, max_size=5)
numbers = st.lists(st.floats(), min_size=COUNT, max_size=COUNT)
makers = st.one_of(
    lists.map(lambda some: lambda: some),
    lists.map(lambda some: lambda: tuple(some)),
    lists.map(lambda some: lambda: generator(some)),
    lists.map(lambda some: lambda: awaited(some)),
    numbers.map(lambda some: lambda: numpy.array(some)),
    numbers.map(lambda some: lambda: torch.tensor(some)),
    numbers.map(lambda some: lambda: torch.tensor([some])),
    values.map(lambda one: lambda: one),
    errors.map(lambda error: lambda: raises(error)),
    st.dictionaries(texts, values).map(lambda some: lambda: some),
    st.just(lambda: torch.tensor([[1.0]] * COUNT)),
)


@tries(150)
@example(make=lambda: raises(SystemExit(1)), timeout=None)
@given(make=makers, timeout=st.sampled_from([60.0, None]))
def test_reward_is_finite_or_a_counted_failure(make: Callable[[], Any], timeout: float | None) -> None:
    def odd(completions: list[str]) -> Any:
        return make()

    def fine(completions: list[str]) -> list[float]:
        return [1.0] * len(completions)

    rewarder = Rewarder([named_reward("odd", odd), named_reward("fine", fine)], timeout=timeout)
    outcomes = rewarder.score(EXAMPLES, ["a", "b", "c"], [[4], [5], [6]])
    outcome = outcomes["odd"]
    assert len(outcome.values) == len(outcome.failed) == COUNT
    for value, failed in zip(outcome.values, outcome.failed, strict=True):
        assert value is None or (isinstance(value, float) and math.isfinite(value))
        assert value is None or not failed
    assert any(outcome.failed) == (outcome.message is not None)
    combined = rewarder.combine(outcomes, COUNT)
    for whole, value, failed in zip(combined, outcome.values, outcome.failed, strict=True):
        assert whole == (None if failed else 1.0 + (value or 0.0)), "a failure is never a number"


@tries(50)
@given(returned=st.lists(st.none() | st.floats() | st.just(ValueError()), min_size=COUNT, max_size=COUNT))
def test_failures_are_counted_per_sample(returned: list[Any]) -> None:
    outcome = Rewarder([named_reward("odd", lambda completions: returned)]).score(
        EXAMPLES, ["a", "b", "c"], [[4], [5], [6]]
    )["odd"]
    known = [isinstance(value, float) and math.isfinite(value) for value in returned]
    assert outcome.values == [value if ok else None for value, ok in zip(returned, known, strict=True)]
    assert outcome.failed == [value is not None and not ok for value, ok in zip(returned, known, strict=True)]


def test_infinite_results_are_read_only_as_far_as_needed() -> None:
    taken: list[float] = []

    def endless(completions: list[str]) -> Any:
        for _ in range(100_000):
            taken.append(0.5)
            yield 0.5

    outcome = Rewarder([named_reward("odd", endless)]).score(EXAMPLES, ["a", "b", "c"], [[4], [5], [6]])[
        "odd"
    ]
    assert (outcome.failed, outcome.timed_out) == ([True] * COUNT, [False] * COUNT)
    assert outcome.message == "returned more than 3 values for 3 completions"
    assert len(taken) == COUNT + 1
