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
    scale: Literal["none", "group", "batch"] = "none",
    min_std: Float[Tensor, " P"] | None = None,
) -> Float[Tensor, "P G"]:
    """Reward minus the mean of its group, optionally divided by a standard deviation.

    Source: GRPO (arXiv 2402.03300, section 4.1.2); without the division, Dr. GRPO (arXiv 2503.20783); by that
    of the batch, Lite PPO (arXiv 2508.08221).

    Args:
        rewards: One row per prompt, in any unit. Values where `known` is False have no effect.
        known: False for a rollout without a reward, which the group's mean and deviation exclude.
        scale: "none" keeps the reward's unit; "group" divides by the unbiased standard deviation of the
            group, "batch" by that of all known rewards.
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
    if scale == "batch":
        std = _std_of_batch(rewards, known).expand_as(count)
    else:
        std = (centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    if min_std is not None:
        std = torch.maximum(std, min_std.unsqueeze(-1))
    return centred / (std + STD_EPSILON)


def decoupled_advantages(
    rewards: Float[Tensor, "K P G"],
    known: Bool[Tensor, "K P G"],
    weights: Float[Tensor, " K"],
    *,
    min_std: Float[Tensor, " P"] | None = None,
) -> Float[Tensor, "P G"]:
    """Advantages of K reward functions, each normalized within its groups, then added with their weights.

    The sum is divided by its standard deviation over the batch. If the rewards are added before they are
    normalized (`group_advantages`), a function with a large deviation hides the others, and different
    combinations of rewards get the same advantage. Source: GDPO (arXiv 2601.05242), TRL's
    `normalize_then_sum`. TRL also subtracts the mean of the batch, which is 0 because that of each group is.

    Args:
        rewards: Unweighted values of each function, one row per prompt. Values where `known` is False have no
            effect.
        known: False where a function has no value.
        weights: One per function.
        min_std: Smallest standard deviation to divide by, one per prompt; None sets no limit.

    Returns:
        Advantages; exactly 0 where no function has a value.
    """
    parts = [
        weight * group_advantages(values, mask, scale="group", min_std=min_std)
        for values, mask, weight in zip(rewards, known, weights, strict=True)
    ]
    total = torch.stack(parts).sum(0)
    std = _std_of_batch(total, known.any(0))
    if min_std is not None:
        std = torch.maximum(std, min_std.unsqueeze(-1))
    return total / (std + STD_EPSILON)


def _std_of_batch(values: Float[Tensor, "P G"], known: Bool[Tensor, "P G"]) -> Float[Tensor, ""]:
    """The unbiased standard deviation of the known values; 0 for fewer than two."""
    count = known.sum()
    mean = torch.where(known, values, 0.0).sum() / count.clamp(min=1)
    squares = torch.where(known, values - mean, 0.0).square().sum()
    return (squares / (count - 1).clamp(min=1)).sqrt()
