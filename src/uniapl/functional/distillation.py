"""On-policy distillation: the reverse KL from the policy to a teacher, on the policy's own completions."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from uniapl.functional.losses import policy_ratios


def sampled_reverse_kl(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    teacher_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    weights: Float[Tensor, "B T"] | None = None,
) -> Float[Tensor, ""]:
    """Sum of `rho_t (log p_t - log p_teacher,t)` over the sampled tokens; the difference carries no gradient.

    On-policy its value is the estimate k1 of KL(policy || teacher) per token, and its gradient
    `(log p - log p_teacher) grad log p` that of the KL itself, without bias. The token's effect on later
    tokens is left out. Source: on-policy distillation (arXiv 2306.13649, with reverse KL) as a policy
    gradient per token (Lu et al., "On-Policy Distillation", Thinking Machines, 2025).

    Args:
        logprobs: Current policy, nats. Carries the gradient.
        old_logprobs: Policy before the update, nats, at the same temperature. No gradient.
        teacher_logprobs: Teacher, nats, at the same temperature. No gradient.
        mask: The rollout tokens.
        weights: A factor per token (see `length_weights`). No gradient.
    """
    difference = torch.where(mask, logprobs.detach() - teacher_logprobs, 0.0)
    terms = policy_ratios(logprobs, old_logprobs, mask) * difference
    if weights is not None:
        terms = terms * weights
    return torch.where(mask, terms, 0.0).sum()


def top_k_reverse_kl(
    logprobs: Float[Tensor, "B T K"],
    teacher_logprobs: Float[Tensor, "B T K"],
    mask: Bool[Tensor, "B T"],
    *,
    weights: Float[Tensor, "B T"] | None = None,
) -> Float[Tensor, ""]:
    """Sum over the tokens of KL(policy || teacher) between distributions on K tokens and "any other".

    It never exceeds the KL of the full distributions and equals it if K covers the vocabulary. In contrast
    to `sampled_reverse_kl` it has no sampling noise. Source: TRL's `loss_top_k` with `loss_add_tail`, on the
    teacher's K most likely tokens.

    Args:
        logprobs: Current policy, nats, of the K tokens at each position. Carries the gradient.
        teacher_logprobs: Teacher, nats, of the same tokens at the same temperature. No gradient.
        mask: The rollout tokens.
        weights: A factor per token (see `length_weights`). No gradient.
    """
    inside = mask.unsqueeze(-1)
    policy = _with_rest(torch.where(inside, logprobs, 0.0))
    teacher = _with_rest(torch.where(inside, teacher_logprobs, 0.0))
    terms = (policy.exp() * (policy - teacher)).sum(-1)
    if weights is not None:
        terms = terms * weights
    return torch.where(mask, terms, 0.0).sum()


def _with_rest(logprobs: Float[Tensor, "B T K"]) -> Float[Tensor, "B T K1"]:
    """Append the log-probability of all other tokens, at least that of the dtype's rounding error."""
    rest = 1 - logprobs.exp().sum(-1, keepdim=True)
    smallest = torch.finfo(logprobs.dtype).eps
    return torch.cat([logprobs, rest.clamp(min=smallest).log()], dim=-1)
