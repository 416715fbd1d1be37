"""The mathematics of the method: pure functions without configuration, model, process rank or randomness.

Every loss is a SUM over the tokens that its mask selects; only `objective` divides.

Shapes: P prompts, G rollouts per prompt, B rows of a micro-batch, T token positions, N selected tokens,
D hidden size, V vocabulary size.
"""

from uniapl.functional.advantages import decoupled_advantages, group_advantages
from uniapl.functional.adversarial import (
    adversarial_advantages,
    bradley_terry_loss,
    logistic_losses,
    multiplied_rewards,
    win_probability,
)
from uniapl.functional.controllers import Multiplier, dual_ascent, expert_gap, pid
from uniapl.functional.distillation import sampled_reverse_kl, top_k_reverse_kl
from uniapl.functional.logprobs import logprobs_from_logits, selected_logprobs, top_logprobs
from uniapl.functional.losses import (
    cispo_loss,
    clip_counts,
    clipped_surrogate,
    divisors,
    importance_weights,
    k3_kl,
    length_weights,
    objective,
    policy_ratios,
    sft_loss,
)
from uniapl.functional.schedules import reward_threshold, warmup_cosine

__all__ = [
    "Multiplier",
    "adversarial_advantages",
    "bradley_terry_loss",
    "cispo_loss",
    "clip_counts",
    "clipped_surrogate",
    "decoupled_advantages",
    "divisors",
    "dual_ascent",
    "expert_gap",
    "group_advantages",
    "importance_weights",
    "k3_kl",
    "length_weights",
    "logistic_losses",
    "logprobs_from_logits",
    "multiplied_rewards",
    "objective",
    "pid",
    "policy_ratios",
    "reward_threshold",
    "sampled_reverse_kl",
    "selected_logprobs",
    "sft_loss",
    "top_k_reverse_kl",
    "top_logprobs",
    "warmup_cosine",
    "win_probability",
]
