"""Preference pairs: the DPO loss of a preferred and a rejected completion of the same prompt."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid


def implicit_rewards(
    logprobs: Float[Tensor, "B T"],
    ref_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    chosen: Int[Tensor, " B"],
    *,
    beta: float,
) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
    """`beta (log pi - log pi_ref)` of the chosen and of the rejected completion of each pair.

    Source: DPO (arXiv 2305.18290, eq. 5 without the term that depends only on the prompt).

    Args:
        logprobs: Current policy, nats. Carries the gradient.
        ref_logprobs: Reference policy on the same tokens, nats. No gradient.
        mask: The completion tokens of the pairs.
        chosen: For a rejected completion, the row of the chosen one; -1 for all other rows. Several rejected
            completions may share a chosen one.
        beta: Strength of the pull to the reference (TRL's `beta` in DPOConfig).
    """
    rewards = beta * torch.where(mask, logprobs - ref_logprobs, 0.0).sum(-1)
    (rejected,) = torch.where(chosen >= 0)
    return rewards[chosen[rejected]], rewards[rejected]


def preference_loss(
    chosen_rewards: Float[Tensor, " P"], rejected_rewards: Float[Tensor, " P"]
) -> Float[Tensor, ""]:
    """Sum over the pairs of `-log sigmoid(margin)`, the margin being the difference of the implicit rewards.

    Source: DPO (arXiv 2305.18290, eq. 7), TRL's `loss_type: sigmoid`. With rollouts as the rejected
    completions it is SPIN (arXiv 2401.01335, eq. 4.7).
    """
    return -logsigmoid(chosen_rewards - rejected_rewards).sum()
