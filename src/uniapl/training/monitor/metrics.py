"""A step's metrics, and the records of completions.jsonl.

A metric with the name of a metric of TRL's GRPOTrainer, SFTTrainer or DPOTrainer is computed as TRL computes
it.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from uniapl.config.objective import ObjectiveConfig
from uniapl.functional import expert_gap
from uniapl.rewards import RewardOutcome
from uniapl.tolerance import all_same, same
from uniapl.tools.metrics import tool_metrics
from uniapl.training.update.credit import Credit, known_passing
from uniapl.training.update.policy_step import PolicyStep
from uniapl.types import RolloutGroup


def update_metrics(
    step: PolicyStep, counts: Mapping[str, int], weights: Mapping[str, float]
) -> dict[str, Any]:
    """Loss, its components (unweighted, divided as in the loss), clip ratios and sampler mismatch.

    A component without weight has no value: the batch leaves out rows that only it would use. For the same
    reason the means named "trained/" are over the rollout tokens of rows that have a gradient.
    """
    sums, trained_tokens = step.sums, step.sums["rollout_tokens"]
    divisors = {**counts, "clip": counts["kl"], "pref": 0, **step.divisors}

    def per(component: str, name: str | None = None, divisor: int | None = None) -> float | None:
        value = sums.get(name or component)
        tokens = "kl" if component == "teacher" else component
        has_gradient = {**divisors, **counts}[tokens] and weights.get(component)
        return value / (divisor or divisors[component]) if value is not None and has_gradient else None

    def of_trained(name: str) -> float | None:
        return sums[name] / trained_tokens if trained_tokens and name in sums else None

    def clipped(*names: str) -> float | None:
        """Over all rollout tokens or, with a ratio per sequence, completions, as in TRL: those without a
        reward or an advantage are never clipped.
        """
        has_gradient = counts["rl"] and weights["rl"]
        return sum(sums[name] for name in names) / divisors["clip"] if has_gradient else None

    return {
        "loss": sums["loss"],
        "loss/sft": per("sft"),
        "loss/rl": per("rl"),
        "loss/adv": per("adv"),
        "loss/kl": per("kl"),
        "loss/teacher": per("teacher"),
        "loss/pref": per("pref"),
        "sft/nll": per("sft", "nll"),
        "kl": per("kl", "token_kl" if "token_kl" in sums else "kl", counts["kl"]),
        "weight/mu": weights["sft"],
        "weight/rl": weights["rl"],
        "tokens/sft": counts["sft"],
        "tokens/rl": counts["rl"],
        "tokens/adv": counts["adv"],
        "grad_norm": step.grad_norm,
        "clip_ratio/low_mean": clipped("clip_low"),
        "clip_ratio/high_mean": clipped("clip_high"),
        "clip_ratio/region_mean": clipped("clip_low", "clip_high"),
        "trained/entropy": of_trained("entropy"),
        "trained/sampling_logp_difference/mean": of_trained("sampling_difference"),
        "trained/sampling_logp_difference/max": sums["sampling_difference_max"] if trained_tokens else None,
        "trained/importance_sampling_ratio/mean": of_trained("importance"),
        **(_pair_metrics(per) if "pref" in sums else {}),
    }


def _pair_metrics(per: Callable[[str, str], float | None]) -> dict[str, float | None]:
    """Means over the preference pairs, by the names of TRL's DPOTrainer."""
    chosen, rejected = per("pref", "chosen"), per("pref", "rejected")
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": None if chosen is None or rejected is None else chosen - rejected,
        "rewards/accuracies": per("pref", "preferred"),
    }


def rollout_metrics(
    groups: Sequence[RolloutGroup], credits: Sequence[Credit], objective: ObjectiveConfig, *, step: int
) -> dict[str, Any]:
    """Rewards, group outcomes, completion lengths, estimated entropy, staleness and win rate.

    Args:
        groups: All sampled groups, also those that were replaced: the rewards of the others would not measure
            the policy.
        credits: Those of the trained groups.
        objective: Says which completions pass (see :func:`passing`).
        step: The step whose update uses the rollouts.
    """
    if not groups:
        return {}
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    known = [[r for r in group.rewards if r is not None] for group in groups]
    rewarded = [rewards for rewards in known if rewards]
    every = [reward for rewards in rewarded for reward in rewards]
    constant = [rewards for rewards in rewarded if all_same(rewards)]
    highest, lowest = max(every, default=0.0), min(every, default=0.0)
    varied = not same(lowest, highest)
    lengths = [rollout.num_sampled for rollout in rollouts]
    ended = [r.num_sampled for r in rollouts if r.finish_reason == "stop"]
    wins = [u for credit in credits for u in credit.win_rates if u is not None]
    metrics = {
        "reward": _mean(every),
        "pass_rate": _mean([float(passed) for group in groups for passed in known_passing(group, objective)]),
        "reward_std": _std(every),
        # Of all sampled groups; one with fewer than two rewards has no standard deviation.
        "frac_reward_zero_std": sum(len(r) > 1 for r in constant) / len(groups) if rewarded else None,
        "groups/mixed": 1 - len(constant) / len(rewarded) if rewarded else None,
        # Good and bad are the step's best and worst reward; if all rewards are equal, neither is known.
        "groups/all_good": _fraction(constant, highest, rewarded) if varied else None,
        "groups/all_bad": _fraction(constant, lowest, rewarded) if varied else None,
        "completions/mean_length": _mean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/mean_terminated_length": _mean(ended),
        "completions/min_terminated_length": min(ended, default=None),
        "completions/max_terminated_length": max(ended, default=None),
        "completions/clipped_ratio": 1 - len(ended) / len(rollouts),
        # Each log-probability is one draw of what the entropy is the mean of, so this needs no forward pass.
        "rollout/entropy_estimate": _mean([-p for r in rollouts for p in r.sampling_logprobs]),
        "rollout/staleness": _mean([step - rollout.policy_version for rollout in rollouts]),
    }
    metrics |= tool_metrics(rollouts)
    if wins:
        metrics["discriminator/win_rate"] = win_rate = statistics.fmean(wins)
        metrics["discriminator/expert_gap"] = expert_gap(win_rate)
    if changes := [c for credit in credits for c in credit.reward_changes]:
        metrics["adversary/reward_change"] = statistics.fmean(changes)
        metrics["adversary/advantage_change"] = _mean([c for k in credits for c in k.advantage_changes])
    for name in groups[0].reward_parts:
        values = [v for group in groups for v in group.reward_parts[name] if v is not None]
        metrics[f"rewards/{name}/mean"] = _mean(values)
        metrics[f"rewards/{name}/std"] = _std(values)
    return metrics


def reward_health(outcomes: Mapping[str, Sequence[RewardOutcome]]) -> dict[str, Any]:
    """Fractions of samples on which each function failed, timed out or returned None, over all processes."""
    metrics: dict[str, Any] = {}
    for name, parts in outcomes.items():
        total = sum(len(part.values) for part in parts)
        failed = sum(sum(part.failed) for part in parts)
        late = sum(sum(part.timed_out) for part in parts)
        unscored = sum(value is None for part in parts for value in part.values) - failed
        metrics[f"rewards/{name}/error_rate"] = (failed - late) / total if total else None
        metrics[f"rewards/{name}/timeout_rate"] = late / total if total else None
        metrics[f"rewards/{name}/none_rate"] = unscored / total if total else None
        metrics[f"time/rewards/{name}"] = max((part.seconds for part in parts), default=0.0)
    return metrics


def pair_metrics(groups: Iterable[RolloutGroup]) -> dict[str, float]:
    """Accuracy, margin and mean win probability on fresh pairs, before the discriminator trains on them."""
    margins = [
        group.expert_logit - logit
        for group in groups
        if group.expert_logit is not None and group.policy_logits is not None
        for logit in group.policy_logits
        if math.isfinite(group.expert_logit - logit)
    ]
    if not margins:
        return {}
    # A tie counts half: a discriminator with constant logits has accuracy 0.5, not 0.
    return {
        "discriminator/accuracy": statistics.fmean((m > 0) + (m == 0) / 2 for m in margins),
        "discriminator/margin": statistics.fmean(margins),
        "discriminator/pair_win_rate": statistics.fmean(0.5 - 0.5 * math.tanh(m / 2) for m in margins),
    }


def length_metrics(groups: Iterable[RolloutGroup]) -> dict[str, float]:
    """Lengths of the rollouts compared with the demonstrations of the same prompts.

    Returns:
        "completions/length_ratio", policy over expert; and "completions/length_auc", the fraction of pairs in
        which the rollout is longer (a tie counts half). It is the accuracy of length as a discriminator: 0.5
        is chance. A discriminator no further from 0.5 may have learned only length.
    """
    pairs = [
        (tokens.num_written, rollout.num_sampled)
        for group in groups
        if (tokens := group.example.demonstration_tokens) is not None
        for rollout in group.rollouts
    ]
    if not pairs:
        return {}
    return {
        "completions/length_ratio": sum(policy for _, policy in pairs) / sum(expert for expert, _ in pairs),
        "completions/length_auc": statistics.fmean((p > e) + (p == e) / 2 for e, p in pairs),
    }


def _mean(values: Sequence[float] | Sequence[int]) -> float | None:
    return statistics.fmean(values) if values else None


def _std(values: Sequence[float]) -> float | None:
    """Unbiased (n - 1), as in TRL; None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def _fraction(constant: Sequence[list[float]], value: float, groups: Sequence[list[float]]) -> float:
    return sum(same(rewards[0], value) for rewards in constant) / len(groups)
