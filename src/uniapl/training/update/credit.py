"""Advantages from rewards and discriminator logits, and rows from groups of rollouts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from uniapl.config.objective import ObjectiveConfig
from uniapl.data.batching import Row
from uniapl.functional import (
    adversarial_advantages,
    decoupled_advantages,
    group_advantages,
    multiplied_rewards,
    win_probability,
)
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
        return replace(
            self, advantages=(None,) * len(self.advantages), reward_changes=(), advantage_changes=()
        )


def assign_credit(
    groups: Sequence[RolloutGroup],
    objective: ObjectiveConfig,
    *,
    expert_mean: float | None,
    lambda_adv: float,
    reward_weights: Mapping[str, float] | None = None,
) -> list[Credit]:
    """Group-relative advantages of the rewards and of the adversary.

    Args:
        groups: All groups of the step, because `scale_rewards: batch` and `normalize_then_sum` divide by a
            deviation over all of them.
        expert_mean: Used as the expert's logit if a prompt has no demonstration; None gives such a group no
            adversarial credit.
        lambda_adv: The adversary's weight in this step: of the adversarial advantage that is added to the
            reward's (adversarial_placement: reward), or the exponent of u (multiply). 0 changes no reward.
        reward_weights: Reward function -> its weight, for `normalize_then_sum`.
    """
    if not groups:
        return []
    rewards, known, weights = _rewards(groups, objective, reward_weights or {})
    least = torch.zeros(len(groups), dtype=torch.float64)
    advantages = _advantages(rewards, known, weights, least, objective)
    judged = [_judge(group, objective, expert_mean) for group in groups]
    acts = [bool(lambda_adv) and bool(one.usable.any()) for one in judged]
    multiplied, before = rewards.clone(), advantages
    if objective.adversarial_placement == "multiply" and any(acts):
        for number, (group, one) in enumerate(zip(groups, judged, strict=True)):
            if acts[number]:
                passes = torch.tensor([passing(group, objective)])
                every = known[:, number, : len(group.rollouts)].any(0)
                least[number] = STD_OF_PASSING if bool(passes[0][every].all()) else 0.0
                _multiply(multiplied[:, number], weights, one, passes, exponent=lambda_adv)
        advantages = _advantages(multiplied, known, weights, least, objective)
    credits: list[Credit] = []
    for number, one in enumerate(judged):
        size = one.usable.shape[1]
        mine, every = advantages[number, :size], known[:, number, :size].any(0)
        changes: dict[str, tuple[float, ...]] = {}
        if lambda_adv and objective.adversarial_placement == "reward":
            mine = mine + lambda_adv * one.advantages[0]
        elif acts[number] and objective.adversarial_placement == "multiply":
            lost = (weights.unsqueeze(-1) * (rewards - multiplied)[:, number, :size]).sum(0)
            changes["reward_changes"] = tuple(lost[every].tolist())
            changes["advantage_changes"] = tuple((mine - before[number, :size])[every].abs().tolist())
        credits.append(
            Credit(
                advantages=_where_known(mine, every),
                adversarial_advantages=_where_known(one.advantages[0], one.usable[0]),
                win_rates=_where_known(one.wins[0], one.usable[0]),
                **changes,
            )
        )
    return credits


class _Judged(NamedTuple):
    """What the discriminator says about a group, [1, G]."""

    advantages: torch.Tensor
    wins: torch.Tensor
    usable: torch.Tensor


def _judge(group: RolloutGroup, objective: ObjectiveConfig, expert_mean: float | None) -> _Judged:
    unknown = (None,) * len(group.rollouts)
    expert = group.expert_logit if group.expert_logit is not None else expert_mean
    if expert is None or not math.isfinite(expert):
        expert, policy_logits = 0.0, unknown
    else:
        policy_logits = [x if math.isfinite(x) else None for x in group.policy_logits or ()] or unknown
    logits, usable = _with_mask([policy_logits])
    expert_logits = torch.tensor([expert], dtype=torch.float64)
    advantages = adversarial_advantages(
        logits, expert_logits, usable, adversarial_credit=objective.adversarial_credit
    )
    return _Judged(advantages, win_probability(logits, expert_logits), usable)


def _rewards(
    groups: Sequence[RolloutGroup], objective: ObjectiveConfig, weights: Mapping[str, float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards [K, P, G], the mask of the known ones, and weights [K]; shorter groups are padded.

    K is the number of reward functions with `normalize_then_sum`, otherwise 1, for their weighted sum. A
    completion whose sum is unknown, because a function failed, has no known part either.
    """
    unknown = [(None,) * len(group.rollouts) for group in groups]
    sums, known = _with_mask([group.rewards or none for group, none in zip(groups, unknown, strict=True)])
    names = [*dict.fromkeys(name for group in groups for name in group.reward_parts)]
    if objective.multi_objective_aggregation == "sum_then_normalize" or not names:
        return sums.unsqueeze(0), known.unsqueeze(0), sums.new_ones(1)
    parts = [
        _with_mask([group.reward_parts.get(n, none) for group, none in zip(groups, unknown, strict=True)])
        for n in names
    ]
    values, masks = zip(*parts, strict=True)
    return (
        torch.stack(values),
        torch.stack(masks) & known,
        sums.new_tensor([weights.get(n, 1) for n in names]),
    )


def _advantages(
    rewards: torch.Tensor,
    known: torch.Tensor,
    weights: torch.Tensor,
    least: torch.Tensor,
    objective: ObjectiveConfig,
) -> torch.Tensor:
    """Advantages [P, G]; unknown ones are 0."""
    if objective.multi_objective_aggregation == "normalize_then_sum":
        return decoupled_advantages(rewards, known, weights, min_std=least)
    return group_advantages(rewards[0], known[0], scale=objective.scale_rewards, min_std=least)


def _multiply(
    rewards: torch.Tensor,
    weights: torch.Tensor,
    judged: _Judged,
    passes: torch.Tensor,
    *,
    exponent: float,
) -> None:
    """Multiply a group's rewards [K, G] in place.

    The weighted reward is multiplied, so that a function with a negative weight stays a penalty.
    """
    size = passes.shape[1]
    # Without a logit it is undecided whether the completion is the expert's.
    wins = torch.where(judged.usable, judged.wins, 0.5)
    for number, weight in enumerate(weights.tolist()):
        if weight:
            mine = weight * rewards[number : number + 1, :size]
            product = multiplied_rewards(mine, wins, passes, exponent=exponent)
            rewards[number, :size] = product[0] / weight


def passing(group: RolloutGroup, objective: ObjectiveConfig) -> tuple[bool, ...]:
    """Whether each rollout passes, by the value of the deciding reward function and `pass_threshold`.

    That function is `pass_reward`, or else the first that applies to the prompt. The weighted sum does not
    decide, because other functions, such as a bonus for length, could make a wrong completion pass. A rollout
    without a value does not pass.
    """
    return tuple(
        value is not None and at_least(value, objective.pass_threshold)
        for value in deciding_values(group, objective)
    )


def known_passing(group: RolloutGroup, objective: ObjectiveConfig) -> list[bool]:
    """Whether each rollout passes, of those with a value of the deciding reward function."""
    values = deciding_values(group, objective)
    return [p for p, value in zip(passing(group, objective), values, strict=True) if value is not None]


def deciding_values(group: RolloutGroup, objective: ObjectiveConfig) -> tuple[float | None, ...]:
    """The value of each rollout that decides whether it passes (see `passing`); None if it is unknown.

    It is unknown also if the reward is, because the function that should decide may have failed.
    """
    applying = (name for name, values in group.reward_parts.items() if any(v is not None for v in values))
    name = objective.pass_reward or next(applying, None)
    values = group.reward_parts[name] if name is not None else group.rewards
    known = zip(values, group.rewards or values, strict=True)
    return tuple(value if reward is not None else None for value, reward in known) or (None,) * len(
        group.rollouts
    )


def groups_without_advantage(
    groups: Sequence[RolloutGroup], objective: ObjectiveConfig, reward_weights: Mapping[str, float]
) -> list[RolloutGroup]:
    """Groups with known rewards, all of them equal, so that every advantage is 0.

    With `normalize_then_sum` the values of every function must be equal. The adversary does not count.
    Source: dynamic sampling of DAPO (arXiv 2503.14476, equation 11), which replaces these groups.
    """
    credits = assign_credit(
        groups, objective, expert_mean=None, lambda_adv=0.0, reward_weights=reward_weights
    )
    return [
        group
        for group, credit in zip(groups, credits, strict=True)
        if (known := [a for a in credit.advantages if a is not None]) and not any(known)
    ]


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
    groups: Sequence[RolloutGroup],
    credits: Sequence[Credit],
    *,
    temperature: float,
    mask_truncated: bool = False,
) -> list[Row]:
    """One row per rollout, in the components whose advantage is known.

    Args:
        mask_truncated: Truncated completions enter no component. Their rewards still count in the mean and
            the deviation of their groups, as in TRL.
    """
    return [
        Row(
            prompt_ids=group.example.prompt_ids,
            completion_ids=rollout.completion_ids,
            given=rollout.given,
            components=frozenset(
                name
                for name, enters in (
                    ("kl", True),
                    ("rl", advantage is not None),
                    ("adv", adversarial is not None),
                )
                if enters and not (mask_truncated and rollout.finish_reason == "length")
            ),
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


def _with_mask(groups: Sequence[Sequence[float | None]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [P, G] in fp64, 0 where unknown, and the mask of the known ones."""
    size = max(len(values) for values in groups)
    padded = [[*values, *(None,) * (size - len(values))] for values in groups]
    filled = [[0.0 if value is None else value for value in values] for values in padded]
    known = [[value is not None for value in values] for values in padded]
    return torch.tensor(filled, dtype=torch.float64), torch.tensor(known)


def _where_known(values: torch.Tensor, known: torch.Tensor) -> tuple[float | None, ...]:
    return tuple(value if use else None for value, use in zip(values.tolist(), known.tolist(), strict=True))
