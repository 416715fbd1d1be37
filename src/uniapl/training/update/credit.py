"""Advantages from rewards and discriminator logits, and rows from groups of rollouts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from uniapl.config.objective import ObjectiveConfig
from uniapl.data.batching import Row
from uniapl.functional import adversarial_advantages, group_advantages, multiplied_rewards, win_probability
from uniapl.tolerance import at_least
from uniapl.types import RolloutGroup

STD_OF_PASSING = 0.5
"""Smallest standard deviation that divides the multiplied rewards of a group in which all completions pass:
that of a fair coin, so that small differences of u stay small. Our choice."""


@dataclass(frozen=True, kw_only=True)
class Credit:
    """Advantages of a group, one entry per rollout; None where the reward or the logit is unknown."""

    advantages: tuple[float | None, ...]
    adversarial_advantages: tuple[float | None, ...]
    win_rates: tuple[float | None, ...]
    """u_i = sigmoid(d(x, y_i) - d(x, y*))."""
    reward_changes: tuple[float, ...] = ()
    """What the multiplication subtracted from each known reward; empty where it did not act."""
    advantage_changes: tuple[float, ...] = ()
    """Difference that the multiplication made to each known advantage; empty where it did not act."""

    def without_rewards(self) -> "Credit":
        """The same credit with every reward unknown."""
        return replace(self, advantages=(None,) * len(self.advantages))


def assign_credit(
    groups: Sequence[RolloutGroup],
    objective: ObjectiveConfig,
    *,
    expert_mean: float | None,
    lambda_adv: float,
) -> list[Credit]:
    """Group-relative advantages of the rewards and of the adversary.

    Args:
        expert_mean: Used as the expert's logit if a prompt has no demonstration; None gives such a group no
            adversarial credit.
        lambda_adv: The adversary's weight in this step: of the adversarial advantage that is added to the
            reward's (adversarial_placement: reward), or the exponent of u (multiply). 0 changes no reward.
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
            logits, expert_logits, usable, adversarial_credit=objective.adversarial_credit
        )
        wins = win_probability(logits, expert_logits)
        # Unknown advantages are 0.
        advantages = group_advantages(rewards, known, scale=objective.scale_rewards)
        changes: dict[str, tuple[float, ...]] = {}
        if lambda_adv and objective.adversarial_placement == "reward":
            advantages += lambda_adv * adversarial
        elif lambda_adv and objective.adversarial_placement == "multiply" and bool(usable.any()):
            passes = torch.tensor([passing(group, objective)])
            # Without a logit it is undecided whether the completion is the expert's.
            multiplied = multiplied_rewards(
                rewards, torch.where(usable, wins, 0.5), passes, exponent=lambda_adv
            )
            all_pass = bool(passes[known].all())
            least = torch.tensor([STD_OF_PASSING if all_pass else 0.0], dtype=torch.float64)
            before = advantages
            advantages = group_advantages(multiplied, known, scale=objective.scale_rewards, min_std=least)
            changes["reward_changes"] = tuple((rewards - multiplied)[known].tolist())
            changes["advantage_changes"] = tuple((advantages - before)[known].abs().tolist())
        credits.append(
            Credit(
                advantages=_where_known(advantages, known),
                adversarial_advantages=_where_known(adversarial, usable),
                win_rates=_where_known(wins, usable),
                **changes,
            )
        )
    return credits


def passing(group: RolloutGroup, objective: ObjectiveConfig) -> tuple[bool, ...]:
    """Whether each rollout passes: the value of the deciding reward function reaches `pass_threshold`.

    This is `pass_reward`, or else the first function that applies to the prompt. The weighted sum does not
    decide, because other functions, such as a bonus for length, could make a wrong completion pass.
    """
    applying = (name for name, values in group.reward_parts.items() if any(v is not None for v in values))
    name = objective.pass_reward or next(applying, None)
    values = group.reward_parts[name] if name is not None else group.rewards
    return tuple(
        value is not None and at_least(value, objective.pass_threshold)
        for value in values or (None,) * len(group.rollouts)
    )


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
            ref_logprobs=rollout.ref_logprobs,
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
