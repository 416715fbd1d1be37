"""The discriminator's loss and the policy's adversarial advantage.

d(x, y) is the discriminator's logit, higher for completions more like the expert's; y* is the demonstration,
y_i a rollout.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

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


def logistic_losses(
    expert_logits: Float[Tensor, " P"], negative_logits: Float[Tensor, " N"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Sums of `-log sigmoid(d)` over demonstrations and of `-log sigmoid(-d)` over negatives.

    Source: the discriminator's loss of Goodfellow et al. (arXiv 1406.2661). Unlike Bradley-Terry pairs, the
    negatives need no demonstration of the same prompt.

    Args:
        expert_logits: d(x, y*) of demonstrations. Carries the gradient.
        negative_logits: d of rollouts, or of demonstrations next to the prompt of another. Carries the
            gradient.
    """
    return softplus(-expert_logits).sum(), softplus(negative_logits).sum()


def multiplied_rewards(
    rewards: Float[Tensor, "P G"],
    win_probabilities: Float[Tensor, "P G"],
    passes: Bool[Tensor, "P G"],
    *,
    exponent: float,
) -> Float[Tensor, "P G"]:
    """`r_i * u_i ** c` for completions that pass, `r_i * min(u_i ** c, 1/2)` for the others.

    A completion without a reward gains nothing by its style, and a completion unlike the expert's loses its
    reward. Source: VARL (arXiv 2607.01181); the bound for completions that fail is our choice, so that a
    partial reward never exceeds that of a completion that passes and is as likely the expert's as not.

    Args:
        rewards: r_i. A negative reward, a penalty, is not multiplied: style would otherwise reduce it.
        win_probabilities: u_i, see :func:`win_probability`.
        passes: Whether the verifier accepts the completion.
        exponent: c; 0 leaves the rewards of passing completions unchanged.
    """
    factor = win_probabilities**exponent
    factor = torch.where(passes, factor, factor.clamp(max=0.5))
    return torch.where(rewards > 0, rewards * factor, rewards)


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
