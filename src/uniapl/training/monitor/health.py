"""Rules that look at the last steps and warn, each with a remedy; they read metrics and change nothing."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from uniapl.config import HealthConfig

Records = Sequence[Mapping[str, Any]]

SIGNIFICANT = 2.0
"""Standard errors by which the means of two windows must differ. Our choice: by chance alone one look in
thirty finds such a rise with the usual window, before the other conditions of a rule."""
SMALL_KL = 0.1
"""Nats per token below which no jump is one. Our choice."""


def warnings(records: Records, config: HealthConfig, *, bounds: tuple[float, float]) -> dict[str, str]:
    """What each rule that fires says, by its name.

    Args:
        records: Metrics of the stage's steps, oldest first. The last `window` of them are looked at, some
            rules compare them with the `window` before; none fires while there are too few.
        bounds: Of a learned lambda.
    """
    window = config.window
    if len(records) < window:
        return {}
    last = records[-window:]
    before = records[-2 * window : -window] if len(records) >= 2 * window else []
    found = {
        "constant_rewards": _constant_rewards(last),
        "zero_advantage": _zero_advantage(last, config.max_frac_reward_zero_std),
        "truncation": _truncation(last, config.max_clipped_ratio),
        "entropy_collapse": _entropy_collapse(last, config.min_entropy),
        "kl_jump": _kl_jump(before, last, config.max_kl_growth),
        "length_explosion": _length_explosion(before, last, config.max_length_growth),
        "discriminator_dead": _discriminator_dead(before, last, config.max_length_advantage),
        "discriminator_saturated": _discriminator_saturated(last, config.max_discriminator_accuracy),
        "divergence": _divergence(before, last),
        "multiplier_pinned": _multiplier_pinned(before, last, bounds[1]),
        "sampler_mismatch": _sampler_mismatch(last, config.max_sampling_difference),
        "no_supervised_tokens": _no_supervised_tokens(last),
    }
    return {name: message for name, message in found.items() if message is not None}


def is_number(value: int | float | None) -> TypeGuard[float]:
    """Known and finite."""
    return value is not None and math.isfinite(value)


def _constant_rewards(last: Records) -> str | None:
    """Every answer of every step had the same reward."""
    means, spreads = _values(last, "reward"), _values(last, "reward_std")
    if len(means) < len(last) or max(means) > min(means) or max(spreads) > 0:
        return None
    return (
        f"every reward of the last {len(last)} steps was {means[0]:g}: there is nothing to learn from them. "
        "Look at completions.jsonl beside the reward function (does it find the answer's form?), "
        "or choose easier prompts"
    )


def _zero_advantage(last: Records, highest: float) -> str | None:
    """Within their groups most answers have the same reward, so that no answer is better than its group."""
    share = _mean(last, "frac_reward_zero_std")
    if share is None or share < highest:
        return None
    return (
        f"in {share:.0%} of the groups all rewards were equal: these rollouts teach nothing. Use prompts of "
        "another difficulty, a graded reward, a higher rollout.temperature or more num_generations"
    )


def _truncation(last: Records, highest: float) -> str | None:
    """Many answers never came to their end."""
    share = _mean(last, "completions/clipped_ratio")
    if share is None or share <= highest:
        return None
    return (
        f"{share:.0%} of the answers were cut off at rollout.max_completion_length and scored unfinished: "
        "raise it, or reward brevity; if they never end, check that demonstrations end with the end token"
    )


def _entropy_collapse(last: Records, lowest: float) -> str | None:
    """The policy has stopped exploring."""
    entropy = _mean(last, "entropy")
    if entropy is None or entropy >= lowest:
        return None
    return (
        f"the entropy fell to {entropy:.2g} nats per token: the answers of a group are all but the same. "
        "Lower optim.learning_rate, raise objective.epsilon_high, or give demonstrations more weight"
    )


def _kl_jump(before: Records, last: Records, growth: float) -> str | None:
    """The newest step lies many times further from the reference than the steps before it did."""
    usual, now = _values([*before, *last[:-1]], "kl"), last[-1].get("kl")
    if not usual or not is_number(now):
        return None
    if now <= max(growth * statistics.median(usual), SMALL_KL):
        return None
    return (
        f"the KL to the reference jumped from {statistics.median(usual):.2g} to {now:.2g}: lower "
        "optim.learning_rate or optim.max_grad_norm, raise objective.beta, and look at this step's rewards"
    )


def _length_explosion(before: Records, last: Records, growth: float) -> str | None:
    """The answers grow much faster than anybody asked for, or far beyond the expert's."""
    length, earlier = _mean(last, "completions/mean_length"), _mean(before, "completions/mean_length")
    ratio = _mean(last, "completions/length_ratio")
    if length is not None and earlier is not None and length > growth * earlier:
        what = f"from {earlier:.0f} to {length:.0f} tokens within {len(last)} steps"
    elif ratio is not None and ratio > growth and _moved(before, last, "completions/length_ratio", up=True):
        what = f"to {ratio:.1f} times the expert's length"
    else:
        return None
    return (
        f"the answers grew {what}: a reward may pay for length. Look at the longest in completions.jsonl, "
        "bound the length in the reward, or raise objective.lambda_adv"
    )


def _discriminator_dead(before: Records, last: Records, advantage: float) -> str | None:
    """It sees less than the answers' lengths alone would tell it, and has had a window's time to learn."""
    accuracy = _mean(last, "discriminator/accuracy")
    aucs = _values(last, "completions/length_auc")
    if accuracy is None or not aucs or not _values(before, "discriminator/accuracy"):
        return None
    by_length = 0.5 + abs(statistics.fmean(aucs) - 0.5)
    if by_length - accuracy <= advantage:
        return None
    return (
        f"the discriminator is right on {accuracy:.0%} of the pairs, length alone on {by_length:.0%}: it has "
        "learnt nothing yet, or was never given the chance. Raise discriminator.learning_rate or "
        "updates_per_step, and check freeze_after_steps and accuracy_band"
    )


def _discriminator_saturated(last: Records, highest: float) -> str | None:
    """It tells every answer from the expert's, step after step."""
    accuracies = _values(last, "discriminator/accuracy")
    if len(accuracies) < len(last) or statistics.fmean(accuracies) < highest:
        return None
    return (
        f"the discriminator is right on {statistics.fmean(accuracies):.1%} of the pairs: its credit says "
        "little of what to do better. Lower discriminator.learning_rate, pause it by accuracy_band, give "
        "demonstrations more weight first, and check that both sides end and are formatted alike"
    )


def _divergence(before: Records, last: Records) -> str | None:
    """The policy wins ever more against the discriminator while what it is really for gets worse."""
    wins = _values(last, "discriminator/win_rate")
    rising = _moved(before, last, "discriminator/win_rate", up=True)
    if not rising or statistics.fmean(wins) <= 0.5:
        return None
    if _moved(before, last, "reward", up=False):
        what = "the reward falls"
    elif _moved(before, last, "sft/nll", up=True):
        what = "the demonstrations get less likely"
    else:
        return None
    return (
        f"the win rate rose to {statistics.fmean(wins):.2f} while {what}: the discriminator is being hacked. "
        "Lower objective.lambda_adv, or let the discriminator keep up (no freeze_after_steps, more "
        "updates_per_step, a higher learning_rate); min_accuracy keeps lambda at 0 until it has"
    )


def _multiplier_pinned(before: Records, last: Records, highest: float) -> str | None:
    """lambda can grow no more, and the reward pays for it."""
    values = _values(last, "constraint/multiplier")
    if not values or min(values) < highest or not _moved(before, last, "reward", up=False):
        return None
    return (
        f"lambda_adv stays at its upper bound {highest:g} while the reward falls: the constraint cannot be "
        "held. Raise objective.max_expert_gap, give demonstrations more weight, or lower lambda_bounds"
    )


def _sampler_mismatch(last: Records, highest: float) -> str | None:
    """What was sampled from is not what is trained. One step is enough: nothing should ever cause it.

    But for older weights (one step off), whose log-probabilities an update has moved.
    """
    if last[-1].get("rollout/staleness"):
        return None
    differences = _values(last[-1:], "sampling/sampling_logp_difference/mean")
    if not differences or differences[0] <= highest:
        return None
    return (
        f"the sampler's log-probabilities differ from the trainer's by {differences[0]:.2g} nats per token: "
        "gradients are of another policy than the one that answered. Train in fp32 (optim.bf16 false), try "
        "model.attn_implementation eager, and check that the model has no dropout or noise of its own"
    )


def _no_supervised_tokens(last: Records) -> str | None:
    """Demonstrations have a weight, and none came."""
    weights, tokens = _values(last, "weight/mu"), _values(last, "tokens/sft")
    if not weights or min(weights) <= 0 or max(tokens, default=0) > 0:
        return None
    return (
        f"no demonstration was learnt from in the last {len(last)} steps although mu is positive: check the "
        "completions in the data and objective.gate_threshold"
    )


def _moved(before: Records, last: Records, key: str, *, up: bool) -> bool:
    """The mean moved in that direction by more than chance does."""
    old, new = _values(before, key), _values(last, key)
    if len(old) < 2 or len(new) < 2:
        return False
    rise = statistics.fmean(new) - statistics.fmean(old)
    error = math.sqrt(statistics.variance(old) / len(old) + statistics.variance(new) / len(new))
    return (rise if up else -rise) > SIGNIFICANT * error


def _mean(records: Records, key: str) -> float | None:
    values = _values(records, key)
    return statistics.fmean(values) if values else None


def _values(records: Records, key: str) -> list[float]:
    return [float(value) for record in records if is_number(value := record.get(key))]
