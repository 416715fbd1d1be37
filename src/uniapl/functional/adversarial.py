"""The adversary's mathematics: the discriminator's loss and the policy's adversarial advantage.

d(x, y) is the discriminator's logit, higher = more like the expert; y* is the demonstration, y_i a rollout.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from uniapl.functional.advantages import group_advantages

Assignment = Literal["win_probability", "logit", "log_sigmoid", "standardized"]


def bradley_terry_loss(
    expert_logits: Float[Tensor, " P"],
    policy_logits: Float[Tensor, " P"],
    *,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Sum of `-log sigmoid(d(x, y*) - d(x, y))` over pairs: the expert's answer should win.

    Source: Bradley and Terry (1952); as a discriminator's loss, GAD (arXiv 2511.10643).

    Args:
        expert_logits: d of the demonstration of each pair. Carries the gradient.
        policy_logits: d of the rollout of the same pair, for the same prompt. Carries the gradient.
        label_smoothing: The share s of pairs that are taken to be the wrong way round: the loss is
            `-(1 - s) log sigmoid(m) - s log sigmoid(-m)` of the margin m, least at
            `log((1 - s) / s)` instead of infinity (as in cDPO; Mitchell 2023).
    """
    margin = expert_logits - policy_logits
    right, wrong = logsigmoid(margin).sum(), logsigmoid(-margin).sum()
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def win_probability(
    policy_logits: Float[Tensor, "P G"], expert_logits: Float[Tensor, " P"]
) -> Float[Tensor, "P G"]:
    """`u_i = sigmoid(d(x, y_i) - d(x, y*))`: that the rollout passes for the expert's answer.

    0.5 means indistinguishable. Source: our choice (the Bradley-Terry model read the other way round).
    """
    return torch.sigmoid(policy_logits - expert_logits.unsqueeze(-1))


def adversarial_advantages(
    policy_logits: Float[Tensor, "P G"],
    expert_logits: Float[Tensor, " P"],
    known: Bool[Tensor, "P G"],
    *,
    assignment: Assignment = "win_probability",
) -> Float[Tensor, "P G"]:
    """The group-centred credit B_i that the adversary gives each rollout.

    Args:
        policy_logits: d of the rollouts; values where ``known`` is False are never read.
        expert_logits: d of the demonstrations, or the running mean where a prompt has none.
        known: False where the discriminator gave no usable logit.
        assignment: What is centred. "win_probability" u_i (default, our choice: bounded, and it fades as the
            policy becomes indistinguishable); "logit" d(x, y_i) (GAD, arXiv 2511.10643); "log_sigmoid"
            log u_i (GAIL's -log(1 - D) family, arXiv 1606.03476); "standardized" d(x, y_i) divided by its
            group's standard deviation.
    """
    match assignment:
        case "win_probability":
            credit = win_probability(policy_logits, expert_logits)
        case "log_sigmoid":
            credit = logsigmoid(policy_logits - expert_logits.unsqueeze(-1))
        case "logit" | "standardized":
            credit = policy_logits
    return group_advantages(credit, known, scale="group" if assignment == "standardized" else "none")
