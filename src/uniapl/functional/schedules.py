"""Weights and the learning rate as functions of the step: nothing to save, nothing to restore."""

import math
from typing import Literal


def warmup_cosine(step: int, *, warmup_steps: int, decay_steps: int, peak: float, valley: float) -> float:
    """Linear from 0 to ``peak`` over the warm-up, then a half cosine down to ``valley``, then ``valley``.

    Source: mu of CHORD (arXiv 2508.11408, section 4.3, and its authors' code). A constant is
    ``peak == valley`` with ``warmup_steps == decay_steps == 0``.

    Args:
        step: Counted from 0.
        warmup_steps: Length of the first phase, in steps.
        decay_steps: Length of the second.
        peak: The weight at the end of the first.
        valley: The weight at the end of the second, and from then on.

    Examples:
        >>> [warmup_cosine(s, warmup_steps=2, decay_steps=2, peak=0.8, valley=0.2) for s in (0, 1, 2, 3, 4)]
        [0.0, 0.4, 0.8, 0.5, 0.2]
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step >= warmup_steps + decay_steps:
        return valley
    progress = (step - warmup_steps) / decay_steps
    return valley + (peak - valley) * 0.5 * (1 + math.cos(math.pi * progress))


def reward_threshold(mean_reward: float, *, threshold: float, peak: float, valley: float) -> float:
    """`max(0, tau - mean(r))`, between ``valley`` and ``peak``: mu falls as the policy gets better.

    Source: CHORD (arXiv 2508.11408, appendix B.1); the limits are our choice.

    Args:
        mean_reward: Of the step's rollouts whose reward is known.
        threshold: tau, the reward from which on demonstrations are not needed.
        peak: mu at most.
        valley: mu at least.
    """
    return min(peak, max(valley, threshold - mean_reward))


def learning_rate_factor(
    step: int, kind: Literal["constant", "linear", "cosine"], *, warmup_steps: int, total_steps: int
) -> float:
    """Factor of the learning rate: linear warm-up, then constant, or a fall to 0 at `total_steps`.

    The shapes are those of transformers' `get_scheduler`.

    Args:
        step: Counted from 0.
        kind: What follows the warm-up.
        warmup_steps: Length of the warm-up.
        total_steps: Length of the whole.
    """
    if step < warmup_steps:
        return step / warmup_steps
    if kind == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1 - progress if kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
