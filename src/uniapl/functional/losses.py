"""The token losses, and `objective`, which combines them.

    L = mu S_sft / N_sft + (1 - mu) w_r S_rl / N_rl + lambda S_adv / N_adv + beta S_kl / N_kl
        + t S_teacher / N_teacher - c S_H / N_H

Each S is a sum over the tokens of one component in the optimizer step (all micro-batches, all processes), and
N is the number of those tokens, unless `loss_type` chooses another divisor (`divisors`). Masks are applied
with `torch.where`: values outside the mask, even NaN, affect neither the loss nor a gradient. w_r is
`reward_weight`, t is `teacher_kl`, c is `entropy_coef`, and S_H the sum of the entropies.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

TokenWeight = Literal["none", "is", "phi", "luffy"]
LossType = Literal["dapo", "bnpo", "grpo", "dr_grpo", "cispo"]
SamplingLevel = Literal["token", "sequence"]

LUFFY_GAMMA = 0.1
"""gamma of p / (p + gamma): LUFFY's published setting (arXiv 2504.14945, "p_div_p_0.1")."""


def sft_loss(
    logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    token_weight: TokenWeight = "none",
) -> Float[Tensor, ""]:
    """Sum of `-w_t log p_t` over the demonstration tokens; the weight w_t carries no gradient.

    Args:
        logprobs: Current policy, nats. Carries the gradient.
        mask: The demonstration tokens, including the end token.
        token_weight: "none" w = 1; "is" w = p (CHORD's SFT-IS, arXiv 2508.11408, eq. 4, where the expert's
            probability is taken as 1; also DFT); "phi" w = p (1 - p) (CHORD-phi, eq. 6); "luffy"
            w = p / (p + 0.1) (arXiv 2504.14945).
    """
    logprobs = torch.where(mask, logprobs, 0.0)
    probs = logprobs.detach().exp()
    match token_weight:
        case "none":
            weight = torch.ones_like(probs)
        case "is":
            weight = probs
        case "phi":
            weight = probs * (1 - probs)
        case "luffy":
            weight = probs / (probs + LUFFY_GAMMA)
    return -torch.where(mask, weight * logprobs, 0.0).sum()


def clipped_surrogate(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    clip_low: float,
    clip_high: float,
    weights: Float[Tensor, "B T"] | None = None,
    level: SamplingLevel = "token",
) -> Float[Tensor, ""]:
    """Sum of `-min(rho_t A, clip(rho_t, 1-epsilon_low, 1+epsilon_high) A)`.

    Source: PPO (arXiv 1707.06347, eq. 7) per token with a group-relative advantage (GRPO, arXiv 2402.03300,
    eq. 3) and two clip widths (DAPO, arXiv 2503.14476). Both the RL and the adversarial term use this
    function, with different advantages and masks. On-policy (`old_logprobs = logprobs.detach()`), its
    gradient equals REINFORCE's.

    Args:
        logprobs: Current policy, nats. Carries the gradient.
        old_logprobs: Policy before the update, nats, at the same temperature. No gradient.
        advantages: One per row; positive values raise the row's probability.
        mask: The rollout tokens that enter this component.
        clip_low: epsilon_low; with 0.2 the ratio is clipped at 0.8.
        clip_high: epsilon_high; with 0.2 the ratio is clipped at 1.2.
        weights: A factor per token (see `importance_weights` and `length_weights`). No gradient.
        level: See `policy_ratios`.
    """
    ratio = policy_ratios(logprobs, old_logprobs, mask, level=level)
    row_advantages = torch.where(mask, advantages.unsqueeze(-1), 0.0)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    terms = torch.minimum(ratio * row_advantages, clipped * row_advantages)
    if weights is not None:
        terms = terms * weights
    return -torch.where(mask, terms, 0.0).sum()


def cispo_loss(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    cap: float,
    weights: Float[Tensor, "B T"] | None = None,
    level: SamplingLevel = "token",
) -> Float[Tensor, ""]:
    """Sum of `-min(rho_t, cap) A log p_t`; the capped ratio carries no gradient.

    No token loses its gradient, in contrast to `clipped_surrogate`, where a clipped ratio has none. Source:
    CISPO (MiniMax-M1, arXiv 2506.13585) without a lower bound, as in ScaleRL (arXiv 2510.13786) and TRL.

    Args:
        logprobs: Current policy, nats. Carries the gradient.
        old_logprobs: Policy before the update, nats, at the same temperature. No gradient.
        advantages: One per row; positive values raise the row's probability.
        mask: The rollout tokens that enter this component.
        cap: Largest ratio, at least 1: TRL's `epsilon_high`, ScaleRL's epsilon_max.
        weights: A factor per token, as in `clipped_surrogate`. No gradient.
        level: See `policy_ratios`.
    """
    ratio = policy_ratios(logprobs, old_logprobs, mask, level=level).detach().clamp(max=cap)
    terms = ratio * torch.where(mask, advantages.unsqueeze(-1), 0.0) * torch.where(mask, logprobs, 0.0)
    if weights is not None:
        terms = terms * weights
    return -torch.where(mask, terms, 0.0).sum()


def policy_ratios(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    level: SamplingLevel = "token",
) -> Float[Tensor, "B T"]:
    """The ratio rho of each token, 1 outside the mask.

    Args:
        logprobs: Current policy, nats. Carries the gradient.
        old_logprobs: Policy before the update, nats.
        mask: The rollout tokens.
        level: "token": p_t / p_old,t (PPO). "sequence": every token of a row has the geometric mean of the
            row's ratios (GSPO, arXiv 2507.18071, eq. 7).
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    if level == "sequence":
        mean = log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        log_ratio = torch.where(mask, mean, 0.0)
    return log_ratio.exp()


def length_weights(mask: Bool[Tensor, "B T"], *, dtype: torch.dtype = torch.float32) -> Float[Tensor, "B T"]:
    """1 / (tokens of the row) for each token under the mask, 0 elsewhere: a row's weighted sum is its mean.

    A row is a complete completion, so the weights do not depend on the micro-batch.
    """
    return torch.where(mask, mask.sum(-1, keepdim=True).clamp(min=1).to(dtype).reciprocal(), 0.0)


def divisors(
    tokens: Mapping[str, int],
    completions: Mapping[str, int],
    *,
    loss_type: LossType,
    max_completion_length: int,
) -> dict[str, int]:
    """The divisor of each component's sum, for `objective`.

    Args:
        tokens: Tokens per component in the optimizer step, over all micro-batches and processes.
        completions: The same for completions.
        loss_type: "dapo" (arXiv 2503.14476), "cispo" and "bnpo": the component's tokens. TRL's "bnpo" uses
            those of the local micro-batch, here the whole step is one batch. "grpo" (arXiv 2402.03300, eq. 3;
            with `length_weights`): its completions. "dr_grpo" (arXiv 2503.20783): its completions times
            `max_completion_length`.
        max_completion_length: Tokens.

    Returns:
        `tokens` for "sft", the divisor of `loss_type` for the rollouts' components "rl", "adv", "kl" and
        "teacher", and "entropy", always the rollout tokens (as in TRL).

    Examples:
        >>> divisors(
        ...     dict(sft=5, rl=6, adv=2, kl=6),
        ...     dict(sft=1, rl=3, adv=1, kl=3),
        ...     loss_type="dr_grpo",
        ...     max_completion_length=8,
        ... )
        {'sft': 5, 'rl': 24, 'adv': 8, 'kl': 24, 'teacher': 24, 'entropy': 6}
    """
    found = dict(tokens)
    for name in ("rl", "adv", "kl"):
        if loss_type == "grpo":
            found[name] = completions[name]
        elif loss_type == "dr_grpo":
            found[name] = completions[name] * max_completion_length
    return found | {"teacher": found["kl"], "entropy": tokens["kl"]}


def importance_weights(
    old_logprobs: Float[Tensor, "B T"],
    sampling_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    cap: float,
) -> Float[Tensor, "B T"]:
    """`min(p_old / p_sampling, cap)` for each token under the mask, 1 elsewhere; without gradient.

    A separate sampler computes slightly different probabilities, or uses parameters that are one step old.
    These importance weights correct for the difference; the cap limits their variance. Source: truncated
    importance sampling (Ionides 2008), per token as in TRL's "token_truncate".

    Args:
        old_logprobs: Policy before the update, nats, computed by the trainer.
        sampling_logprobs: Nats, from the sampler, at the same temperature.
        mask: The rollout tokens.
        cap: Maximum weight, at least 1.
    """
    return torch.where(mask, old_logprobs - sampling_logprobs, 0.0).detach().exp().clamp(max=cap)


def clip_counts(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    clip_low: float,
    clip_high: float,
    level: SamplingLevel = "token",
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Count the tokens, or with level "sequence" the rows, whose gradient the lower and upper clip zero."""
    ratio = policy_ratios(logprobs, old_logprobs, mask, level=level).detach()
    row_advantages = torch.where(mask, advantages.unsqueeze(-1), 0.0)
    low = (ratio < 1 - clip_low) & (row_advantages < 0)
    high = (ratio > 1 + clip_high) & (row_advantages > 0)
    if level == "sequence":
        low, high = low.any(-1), high.any(-1)
    return low.sum().to(logprobs.dtype), high.sum().to(logprobs.dtype)


def k3_kl(
    logprobs: Float[Tensor, "B T"],
    ref_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    weights: Float[Tensor, "B T"] | None = None,
) -> Float[Tensor, ""]:
    """Sum of the k3 estimates `r - 1 - log r`, `r = p_ref / p`, of KL(policy || reference).

    Source: Schulman, "Approximating KL divergence" (2020); GRPO, arXiv 2402.03300, eq. 4. Never negative.

    Args:
        logprobs: Current policy, nats. Carries the gradient.
        ref_logprobs: Reference policy on the same tokens, nats. No gradient.
        mask: The rollout tokens.
        weights: A factor per token (see `length_weights`). No gradient.
    """
    log_ratio = torch.where(mask, ref_logprobs - logprobs, 0.0)
    terms = log_ratio.exp() - 1 - log_ratio
    if weights is not None:
        terms = terms * weights
    return torch.where(mask, terms, 0.0).sum()


def objective(
    sums: Mapping[str, Tensor],
    weights: Mapping[str, float],
    counts: Mapping[str, int],
) -> Tensor:
    """A micro-batch's part of the step's loss: the sum over components of weight * sum / global count.

    This is the only division in the loss, so the amount of data in one component never rescales another.
    Components without tokens or with weight 0 are left out. If none is left, the result is a differentiable
    zero, so that every process still runs a backward pass.

    Args:
        sums: A scalar per component, summed over this micro-batch.
        weights: mu, (1 - mu) * reward_weight, lambda_adv, beta, teacher_kl and -entropy_coef, by the keys of
            `sums`.
        counts: Divisor of each component (see `divisors`), over all micro-batches and processes: by default
            its tokens in the optimizer step.

    Returns:
        A scalar, whose sum over all micro-batches and processes is the loss of the step.

    Raises:
        ValueError: A component has no weight or no count, or has a negative count.

    Examples:
        >>> objective({"sft": torch.tensor(6.0)}, {"sft": 0.5}, {"sft": 3})
        tensor(1.)
    """
    used: list[Tensor] = []
    for name, component in sums.items():
        if name not in weights or name not in counts:
            raise ValueError(f"component '{name}' needs a weight and a count")
        if counts[name] < 0:
            raise ValueError(f"component '{name}' has a negative count: {counts[name]}")
        if counts[name] and weights[name]:
            used.append(component * (weights[name] / counts[name]))
    # Unused components stay out of the graph: zero times infinity in their backward pass would be NaN.
    if not used:
        used = [torch.where(torch.zeros_like(c, dtype=torch.bool), c, 0.0) for c in sums.values()]
    return torch.stack(used).sum()
