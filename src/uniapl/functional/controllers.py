"""Updates of lambda, the Lagrange multiplier of the constraint "the expert gap is at most epsilon".

The problem is: maximise the reward subject to c <= epsilon, where c is 0.5 minus the win rate (the expert gap
max(0, c) is below epsilon exactly when c is). lambda grows while the constraint is violated and falls while
it is satisfied. Both updates are pure functions of the multiplier's state.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Multiplier:
    """A multiplier and the state of its controller."""

    value: float
    """lambda."""
    average: float = 0.0
    """Moving average of the violation (PID only)."""
    integral: float | None = None
    """Sum of Ki times the violation, never negative, starting at the first value (PID only)."""


def expert_gap(win_rate: float) -> float:
    """`g = max(0, 0.5 - mean(u))`: how distinguishable the policy is from the expert, in [0, 0.5].

    Source: our choice; unlike a raw logit, a win rate of Bradley-Terry pairs has an absolute zero.
    """
    return max(0.0, 0.5 - win_rate)


def dual_ascent(
    multiplier: Multiplier, violation: float, *, learning_rate: float, bounds: tuple[float, float]
) -> Multiplier:
    """Dual gradient ascent in log space: `log lambda` increases by `eta (c - epsilon)`.

    Source: Safe RLHF (arXiv 2310.12773, section 3.3), which also learns log lambda. A violation is at most
    0.5 here, so the learning rate is larger than for unbounded costs.

    Args:
        violation: c - epsilon, positive if the constraint is violated; c is 0.5 minus the win rate.
        bounds: Minimum and maximum of lambda. In log space it never reaches 0, nor recovers from close to it.
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
    """`lambda = K_p P + I + K_d D`, clamped to `bounds`.

    P is a moving average of the violation, I the sum of Ki times the violation (at least 0), D the rise of P
    since the last step (0 in the first). Source: PID Lagrangian (arXiv 2007.03964, algorithm 2); the average
    and its decay, as in OmniSafe's code, and the start of the integral at the first lambda are our choice.

    Args:
        violation: c - epsilon, positive if the constraint is violated; c is 0.5 minus the win rate.
        gains: Kp, Ki, Kd.
        bounds: Minimum and maximum of lambda; the maximum also limits the integral, against wind-up.
        decay: Decay of the moving average.
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
