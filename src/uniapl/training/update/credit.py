"""Advantages from rewards and discriminator logits, and rows from groups of rollouts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from uniapl.data.batching import Row
from uniapl.functional import adversarial_advantages, group_advantages, win_probability
from uniapl.functional.adversarial import AdversarialCredit
from uniapl.tolerance import at_least
from uniapl.types import RolloutGroup


@dataclass(frozen=True, kw_only=True)
class Credit:
    """Advantages of a group, one entry per rollout; None where the reward or the logit is unknown."""

    advantages: tuple[float | None, ...]
    adversarial_advantages: tuple[float | None, ...]
    win_rates: tuple[float | None, ...]
    """u_i = sigmoid(d(x, y_i) - d(x, y*))."""

    def without_rewards(self) -> "Credit":
        """The same credit with every reward unknown."""
        return replace(self, advantages=(None,) * len(self.advantages))


def assign_credit(
    groups: Sequence[RolloutGroup],
    *,
    scale_rewards: Literal["none", "group"],
    adversarial_credit: AdversarialCredit,
    expert_mean: float | None,
    adversarial_weight: float = 0.0,
) -> list[Credit]:
    """Group-relative advantages of the rewards and of the adversary.

    Args:
        expert_mean: Used as the expert's logit if a prompt has no demonstration; None gives such a group no
            adversarial advantages.
        adversarial_weight: The adversarial advantage, times this weight, is added to the reward's where both
            are known.
    """
    credits: list[Credit] = []
    for group in groups:
        unknown = (None,) * len(group.rollouts)
        rewards, known = _with_mask(group.rewards or unknown)
        expert = group.expert_logit if group.expert_logit is not None else expert_mean
        if expert is None or not math.isfinite(expert):
            expert, policy_logits = 0.0, unknown
        else:
            policy_logits = [x if math.isfinite(x) else None for x in group.policy_logits or ()] or unknown
        logits, usable = _with_mask(policy_logits)
        expert_logits = torch.tensor([expert], dtype=torch.float64)
        adversarial = adversarial_advantages(
            logits, expert_logits, usable, adversarial_credit=adversarial_credit
        )
        wins = win_probability(logits, expert_logits)
        # Unknown advantages are 0.
        advantages = group_advantages(rewards, known, scale=scale_rewards) + adversarial_weight * adversarial
        credits.append(
            Credit(
                advantages=_where_known(advantages, known),
                adversarial_advantages=_where_known(adversarial, usable),
                win_rates=_where_known(wins, usable),
            )
        )
    return credits


def failed_groups(groups: Sequence[RolloutGroup], threshold: float) -> list[RolloutGroup]:
    """Groups with a demonstration and known rewards, all of them at most `threshold`.

    Source: the gate of HPT (arXiv 2509.04419), which trains on the demonstrations of these prompts.
    """
    return [
        group
        for group in groups
        if group.example.demonstration_ids is not None
        and (known := [reward for reward in group.rewards if reward is not None])
        and at_least(threshold, max(known))
    ]


def rollout_rows(
    groups: Sequence[RolloutGroup], credits: Sequence[Credit], *, temperature: float
) -> list[Row]:
    """One row per rollout, in the components whose advantage is known."""
    return [
        Row(
            prompt_ids=group.example.prompt_ids,
            completion_ids=rollout.completion_ids,
            components=frozenset({"kl"})
            | ({"rl"} if advantage is not None else set())
            | ({"adv"} if adversarial is not None else set()),
            advantage=advantage or 0.0,
            adversarial_advantage=adversarial or 0.0,
            temperature=temperature,
            sampling_logprobs=rollout.sampling_logprobs,
        )
        for group, credit in zip(groups, credits, strict=True)
        for rollout, advantage, adversarial in zip(
            group.rollouts, credit.advantages, credit.adversarial_advantages, strict=True
        )
    ]


def _with_mask(values: Sequence[float | None]) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [1, G] in fp64, 0 where unknown, and the mask of the known ones."""
    filled = torch.tensor([[0.0 if value is None else value for value in values]], dtype=torch.float64)
    return filled, torch.tensor([[value is not None for value in values]])


def _where_known(values: torch.Tensor, known: torch.Tensor) -> tuple[float | None, ...]:
    return tuple(
        value if use else None for value, use in zip(values[0].tolist(), known[0].tolist(), strict=True)
    )
