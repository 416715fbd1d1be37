"""Weights as a function of the step."""

import math


def warmup_cosine(step: int, *, warmup_steps: int, decay_steps: int, peak: float, valley: float) -> float:
    r"""Linear from 0 to ``peak`` over the warm-up, then a half cosine down to ``valley``, then ``valley``.

    Source: mu of CHORD (arXiv 2508.11408, section 4.3, and its authors' code). A constant is
    ``peak == valley`` with ``warmup_steps == decay_steps == 0``.

    Args:
        step: Counted from 0.
        warmup_steps, decay_steps: Lengths of the two phases, in steps.
        peak, valley: The weight at the end of each phase.

    Example:
        >>> [warmup_cosine(s, warmup_steps=2, decay_steps=2, peak=0.8, valley=0.2) for s in (0, 1, 2, 3, 4)]
        [0.0, 0.4, 0.8, 0.5, 0.2]
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step >= warmup_steps + decay_steps:
        return valley
    progress = (step - warmup_steps) / decay_steps
    return valley + (peak - valley) * 0.5 * (1 + math.cos(math.pi * progress))
