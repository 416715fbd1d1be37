"""Rules that learn lambda, the multiplier of the constraint "the expert gap is at most epsilon".

The Lagrangian of: maximise the reward subject to c <= epsilon, where c is 0.5 minus the win rate (below
epsilon exactly when the expert gap max(0, c) is). Its multiplier grows while the constraint is violated and
falls while there is room. Both rules are functions of what they remember: nothing is hidden.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Multiplier:
    """A multiplier, and what its rule remembers."""

    value: float
    """lambda."""
    average: float = 0.0
    """Moving average of the violation; of the PID rule only."""
    integral: float | None = None
    """Sum of Ki times the violation, never negative, begun at the first value; of the PID rule only."""


def expert_gap(win_rate: float) -> float:
    """`g = max(0, 0.5 - mean(u))`: how far the policy is from passing for the expert, in [0, 0.5].

    Source: our choice; Bradley-Terry pairs give it an absolute zero, which a raw logit has not.
    """
    return max(0.0, 0.5 - win_rate)


def dual_ascent(
    multiplier: Multiplier, violation: float, *, learning_rate: float, bounds: tuple[float, float]
) -> Multiplier:
    """Gradient ascent on the dual, in log space: `log lambda` grows by `eta (c - epsilon)`.

    Source: Safe RLHF (arXiv 2310.12773, section 3.3), which learns log lambda too. A violation is at most 0.5
    here, so the learning rate is larger than for unbounded costs.

    Args:
        violation: c - epsilon, positive when the constraint is violated; c is 0.5 minus the win rate.
        bounds: lambda stays within. In log space it would never reach 0, nor come back from next to it.
    """
    return Multiplier(value=_clamp(multiplier.value * math.exp(learning_rate * violation), bounds))


def pid(
    multiplier: Multiplier,
    violation: float,
    *,
    gains: tuple[float, float, float],
    bounds: tuple[float, float],
    decay: float = 0.9,
) -> Multiplier:
    """`lambda = K_p P + I + K_d D`, within bounds.

    P is a moving average of the violation, I its sum times Ki, never negative, and D the rise of P since the
    last step, none in the first. Source: PID Lagrangian (arXiv 2007.03964, algorithm 2); the average and its
    decay as in OmniSafe's code, and an integral that begins at the first value of lambda, are our choice.

    Args:
        violation: c - epsilon, positive when the constraint is violated; c is 0.5 minus the win rate.
        gains: Kp, Ki, Kd.
        bounds: Of lambda; the integral stays below the upper one, so that it does not wind up.
        decay: Of the moving average.
    """
    proportional, integral, derivative = gains
    average = decay * multiplier.average + (1 - decay) * violation
    total = (multiplier.value if multiplier.integral is None else multiplier.integral) + integral * violation
    total = _clamp(total, (0.0, bounds[1]))
    rise = 0.0 if multiplier.integral is None else max(0.0, average - multiplier.average)
    value = proportional * average + total + derivative * rise
    return Multiplier(value=_clamp(value, bounds), average=average, integral=total)


def _clamp(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])
