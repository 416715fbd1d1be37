"""Group-relative advantages."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from uniapl.tolerance import ABSOLUTE, RELATIVE

STD_EPSILON = 1e-4
"""Added to the group's standard deviation, with TRL's value, so that tests can compare the two."""


def group_advantages(
    rewards: Float[Tensor, "P G"],
    known: Bool[Tensor, "P G"],
    *,
    scale: Literal["none", "group"] = "none",
    min_std: Float[Tensor, " P"] | None = None,
) -> Float[Tensor, "P G"]:
    """Reward minus the mean of its group, optionally divided by the group's standard deviation.

    Source: GRPO (arXiv 2402.03300, section 4.1.2); without the division, Dr. GRPO (arXiv 2503.20783).

    Args:
        rewards: One row per prompt, in any unit. Values where `known` is False have no effect.
        known: False for a rollout without a reward, which the group's mean and deviation exclude.
        scale: "none" keeps the reward's unit; "group" divides by the unbiased standard deviation.
        min_std: Smallest standard deviation to divide by, one per prompt; None sets no limit.

    Returns:
        Advantages; exactly 0 for unknown rewards and in groups whose known rewards differ only by rounding
        (:mod:`uniapl.tolerance`), which "group" would amplify.

    Examples:
        >>> group_advantages(torch.tensor([[1.0, 0.0, 9.0]]), torch.tensor([[True, True, False]]))
        tensor([[ 0.5000, -0.5000,  0.0000]])
    """
    count = known.sum(-1, keepdim=True)
    centred = rewards - torch.where(known, rewards, 0.0).sum(-1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(known, centred, 0.0)
    highest = torch.where(known, rewards, -torch.inf).amax(-1, keepdim=True)
    lowest = torch.where(known, rewards, torch.inf).amin(-1, keepdim=True)
    constant = torch.isclose(lowest, highest, rtol=RELATIVE, atol=ABSOLUTE)
    centred = torch.where(constant, 0.0, centred)
    if scale == "none":
        return centred
    variance = centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    std = variance.sqrt()
    if min_std is not None:
        std = torch.maximum(std, min_std.unsqueeze(-1))
    return centred / (std + STD_EPSILON)
