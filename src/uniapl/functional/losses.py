"""The token losses, and `objective`, which combines them.

    L = mu S_sft / N_sft + (1 - mu) w_r S_rl / N_rl + lambda S_adv / N_adv + beta S_kl / N_kl

Each S is a sum over the tokens of one component in the optimizer step (all micro-batches, all processes), and
N is the number of those tokens. Masks are applied with `torch.where`: values outside the mask, even NaN,
affect neither the loss nor a gradient. w_r is `reward_weight`.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

TokenWeight = Literal["none", "is", "phi", "luffy"]

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
        weights: A factor per token (see `importance_weights`). No gradient.
    """
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()
    row_advantages = torch.where(mask, advantages.unsqueeze(-1), 0.0)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    terms = torch.minimum(ratio * row_advantages, clipped * row_advantages)
    if weights is not None:
        terms = terms * weights
    return -torch.where(mask, terms, 0.0).sum()


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
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Count the tokens whose gradient is zeroed by the lower and by the upper clip."""
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).detach().exp()
    row_advantages = torch.where(mask, advantages.unsqueeze(-1), 0.0)
    low = (ratio < 1 - clip_low) & (row_advantages < 0)
    high = (ratio > 1 + clip_high) & (row_advantages > 0)
    return low.sum().to(logprobs.dtype), high.sum().to(logprobs.dtype)


def k3_kl(
    logprobs: Float[Tensor, "B T"],
    ref_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
) -> Float[Tensor, ""]:
    """Sum of the k3 estimates `r - 1 - log r`, `r = p_ref / p`, of KL(policy || reference).

    Source: Schulman, "Approximating KL divergence" (2020); GRPO, arXiv 2402.03300, eq. 4. Never negative.

    Args:
        logprobs: Current policy, nats. Carries the gradient.
        ref_logprobs: Reference policy on the same tokens, nats. No gradient.
        mask: The rollout tokens.
    """
    log_ratio = torch.where(mask, ref_logprobs - logprobs, 0.0)
    return torch.where(mask, log_ratio.exp() - 1 - log_ratio, 0.0).sum()


def objective(
    sums: Mapping[str, Tensor],
    weights: Mapping[str, float],
    counts: Mapping[str, int],
) -> Tensor:
    """A micro-batch's part of the step's loss: the sum over components of weight * sum / global token count.

    This is the only division in the loss, so the amount of data in one component never rescales another.
    Components without tokens or with weight 0 are left out. If none is left, the result is a differentiable
    zero, so that every process still runs a backward pass.

    Args:
        sums: A scalar per component, summed over this micro-batch.
        weights: mu, (1 - mu) * reward_weight, lambda_adv and beta, by the keys of `sums`.
        counts: Tokens per component in the optimizer step, over all micro-batches and processes.

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
