"""The discriminator's loss and the policy's adversarial advantage.

d(x, y) is the discriminator's logit, higher for completions more like the expert's; y* is the demonstration,
y_i a rollout.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from uniapl.functional.advantages import group_advantages

AdversarialCredit = Literal["win_probability", "logit", "log_sigmoid", "standardized"]


def bradley_terry_loss(
    expert_logits: Float[Tensor, " P"],
    policy_logits: Float[Tensor, " P"],
    *,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Sum of `-log sigmoid(d(x, y*) - d(x, y))` over pairs of demonstration and rollout.

    Source: Bradley and Terry (1952); as a discriminator's loss, GAD (arXiv 2511.10643).

    Args:
        expert_logits: d(x, y*) of each pair. Carries the gradient.
        policy_logits: d(x, y) of the rollout for the same prompt. Carries the gradient.
        label_smoothing: The fraction s of pairs that are assumed to be swapped. With the margin m, the loss
            is `-(1 - s) log sigmoid(m) - s log sigmoid(-m)`, and its minimum is at `m = log((1 - s) / s)`
            instead of infinity (as in cDPO; Mitchell 2023).
    """
    margin = expert_logits - policy_logits
    right, wrong = logsigmoid(margin).sum(), logsigmoid(-margin).sum()
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def win_probability(
    policy_logits: Float[Tensor, "P G"], expert_logits: Float[Tensor, " P"]
) -> Float[Tensor, "P G"]:
    """`u_i = sigmoid(d(x, y_i) - d(x, y*))`: the probability that y_i is preferred to y*.

    At 0.5 the two are indistinguishable. Source: our choice (the Bradley-Terry model with its sides swapped).
    """
    return torch.sigmoid(policy_logits - expert_logits.unsqueeze(-1))


def adversarial_advantages(
    policy_logits: Float[Tensor, "P G"],
    expert_logits: Float[Tensor, " P"],
    known: Bool[Tensor, "P G"],
    *,
    adversarial_credit: AdversarialCredit = "win_probability",
) -> Float[Tensor, "P G"]:
    """The adversarial advantage B_i of each rollout: its credit minus the mean of its group.

    Args:
        policy_logits: d(x, y_i). Values where `known` is False have no effect.
        expert_logits: d(x, y*), or the running mean of demonstrations for a prompt without one.
        known: False where the discriminator returned no usable logit.
        adversarial_credit: "win_probability": u_i (default, our choice: bounded, and its differences vanish
            as the policy becomes indistinguishable); "logit": d(x, y_i) (GAD, arXiv 2511.10643);
            "log_sigmoid": log u_i (GAIL's -log(1 - D) family, arXiv 1606.03476); "standardized": d(x, y_i)
            divided by its group's standard deviation.
    """
    match adversarial_credit:
        case "win_probability":
            credit = win_probability(policy_logits, expert_logits)
        case "log_sigmoid":
            credit = logsigmoid(policy_logits - expert_logits.unsqueeze(-1))
        case "logit" | "standardized":
            credit = policy_logits
    return group_advantages(credit, known, scale="group" if adversarial_credit == "standardized" else "none")
