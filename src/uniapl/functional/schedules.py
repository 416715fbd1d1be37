"""Schedules of weights, as functions of the step without state."""

import math


def warmup_cosine(step: int, *, warmup_steps: int, decay_steps: int, peak: float, valley: float) -> float:
    """Linear warm-up from 0 to `peak`, half a cosine down to `valley`, then constant.

    Source: mu of CHORD (arXiv 2508.11408, section 4.3, and its authors' code). `peak == valley` with
    `warmup_steps == decay_steps == 0` gives a constant.

    Args:
        step: Step, from 0.
        warmup_steps: Length of the warm-up, in steps.
        decay_steps: Length of the decay, in steps.
        peak: The weight at the end of the warm-up.
        valley: The weight at the end of the decay.

    Examples:
        >>> [warmup_cosine(s, warmup_steps=2, decay_steps=2, peak=0.8, valley=0.2) for s in (0, 1, 2, 3, 4)]
        [0.0, 0.4, 0.8, 0.5, 0.2]
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    step = step - warmup_steps
    if step >= decay_steps:
        return valley
    progress = step / decay_steps
    return valley + (peak - valley) * 0.5 * (1 + math.cos(math.pi * progress))


def reward_threshold(mean_reward: float, *, threshold: float, peak: float, valley: float) -> float:
    """`tau - mean(r)`, clamped to [`valley`, `peak`]: mu falls as the policy improves.

    Source: CHORD (arXiv 2508.11408, appendix B.1), with a minimum of 0; the limits are our choice.

    Args:
        mean_reward: Mean of the step's known rewards.
        threshold: tau, the mean reward at which demonstrations are no longer needed.
        peak: Maximum of mu.
        valley: Minimum of mu.
    """
    return min(peak, max(valley, threshold - mean_reward))
