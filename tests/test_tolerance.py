"""The tolerance of comparisons of rewards: rounding is ignored, differences are not."""

import itertools
import math

import numpy
import pytest

from uniapl.tolerance import all_same, at_least, same

WEIGHTED = [sum(order) for order in itertools.permutations((0.6, 0.3, 0.1))]
"""One reward, summed in every order: 1.0 and 0.9999999999999999."""
FLOAT32 = float(numpy.float32(0.6) + numpy.float32(0.3) + numpy.float32(0.1))


def test_sums_of_the_same_terms_are_the_same() -> None:
    assert len(set(WEIGHTED)) > 1
    assert all_same(WEIGHTED)
    assert all_same([0.1 + 0.2 - 0.3, 0.0])
    assert all_same([math.nextafter(1, 2), 1.0, math.nextafter(1, 0), FLOAT32])
    assert all_same([1e6, 1e6 + 1e-9])
    assert all(at_least(value, 1.0) and at_least(1.0, value) for value in WEIGHTED)


@pytest.mark.parametrize(
    ("a", "b"), [(1.0, 1.0 + 1e-6), (0.0, 1e-7), (-1.0, 1.0), (1e6, 1e6 + 1), (0.5, 0.51)]
)
def test_differences_are_kept(a: float, b: float) -> None:
    assert not same(a, b)
    assert not all_same([a, b, a])
    assert at_least(b, a)
    assert not at_least(a, b)
