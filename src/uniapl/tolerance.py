"""The one tolerance with which rewards are compared: their last digits depend on the order of additions."""

import math
from collections.abc import Collection

RELATIVE = 2**-21
"""4.8e-7: four units in the last place of float32, in which TRL and many reward functions compute."""
ABSOLUTE = 1e-8
"""For values near 0, where a relative tolerance vanishes; TRL's for a standard deviation of 0."""


def same(a: float, b: float) -> bool:
    """Whether two values differ only by rounding."""
    return math.isclose(a, b, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


def all_same(values: Collection[float]) -> bool:
    """Whether the values, at least one, differ only by rounding."""
    return same(min(values), max(values))


def at_least(value: float, bound: float) -> bool:
    """Whether the value reaches the bound, up to rounding."""
    return value >= bound or same(value, bound)
