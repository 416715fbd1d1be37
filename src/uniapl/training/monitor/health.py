"""Health rules: warnings about the metrics of the last steps, each with a remedy. They change nothing."""

import functools
import math
import operator
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from uniapl.config import Config
from uniapl.tolerance import all_same

Records = Sequence[Mapping[str, Any]]

SIGNIFICANT = 2.0
"""Standard errors by which the means of two windows must differ. Our choice: with the usual window, chance
alone produces such a rise in one comparison out of thirty, before the other conditions of a rule."""
DIVERGING = 3.0
"""The same for the two movements of a divergence, which every step compares. Our choice: at 2, a run of the
demo had both by chance, in one step out of a hundred."""
SMALL_KL = 0.1
"""Nats per token; no smaller KL counts as a jump. Our choice."""
CALLS = "tools/call_frequency"


LIMITS = (
    (
        *("zero_advantage", "frac_reward_zero_std", operator.ge, "max_frac_reward_zero_std"),
        "all rewards were equal in {:.0%} of the groups (limit {:.0%}), so their rollouts have no advantage. "
        "Use easier or harder prompts, a graded reward, a higher rollout.temperature, more "
        "rollout.num_generations or a higher rollout.max_resample_times",
    ),
    (
        *("truncation", "completions/clipped_ratio", operator.gt, "max_clipped_ratio"),
        "{:.0%} of the completions were truncated at rollout.max_completion_length (limit {:.0%}) and scored "
        "incomplete. Raise it or reward brevity; if completions never end, check that demonstrations end "
        "with the end token",
    ),
    (
        *("entropy_collapse", "rollout/entropy_estimate", operator.lt, "min_entropy"),
        "the entropy fell to {:.2g} nats per token (limit {:g}): the completions of a group are nearly "
        "identical. Lower optim.learning_rate, or raise objective.epsilon_high or objective.mu_peak",
    ),
)
"""Rules on the mean of one metric: name, metric, comparison with the limit, the limit's key, message."""


def warnings(records: Records, stage: Config, *, stage_step: int) -> dict[str, str]:
    """The message of each rule that fires, by the rule's name; see :func:`evaluate_rules`."""
    found = evaluate_rules(records, stage, stage_step=stage_step)
    return {name: message for name, message in found.items() if message is not None}


def evaluate_rules(records: Records, stage: Config, *, stage_step: int) -> dict[str, str | None]:
    """The message of each rule, by the rule's name; None if the rule does not fire.

    Args:
        records: Metrics of the stage's steps, oldest first. The rules read the last `window` steps; some
            compare them with the `window` steps before. With fewer than `window` steps no rule is evaluated.
        stage: Configuration of the stage.
        stage_step: Finished steps of the stage.
    """
    config = stage.health
    window = config.window
    if len(records) < window:
        return {}
    last = records[-window:]
    before = records[-2 * window : -window] if len(records) >= 2 * window else []
    found: dict[str, str | None] = {}
    for name, metric, exceeds, key, message in LIMITS:
        mean, limit = _mean(last, metric), getattr(config, key)
        found[name] = message.format(mean, limit) if mean is not None and exceeds(mean, limit) else None
    return found | {
        "constant_rewards": _constant_rewards(last),
        "nothing_passes": _nothing_passes(last, stage),
        "kl_jump": _kl_jump(before, last, config.max_kl_growth),
        "length_explosion": _length_explosion(before, last, config.max_length_growth),
        "length_collapse": _length_collapse(before, last, config.max_length_growth),
        # A head learns which text belongs to the prompt, and a likelihood is not trained.
        "discriminator_dead": _discriminator_dead(before, last, config.max_length_advantage)
        if stage.discriminator.kind == "bradley-terry"
        else None,
        "discriminator_saturated": _discriminator_saturated(last, config.max_discriminator_accuracy),
        "divergence": _divergence(before, last),
        "multiplier_pinned": _multiplier_pinned(before, last, stage.objective.lambda_bounds[1]),
        "adversary_inactive": _adversary_inactive(last, stage, stage_step),
        "sampler_mismatch": _sampler_mismatch(last[-1], config.max_sampling_difference),
        "tools_unused": _tools_unused(last, config.min_tool_calls),
        "tools_failing": _tools_failing(last, config.max_tool_failures),
        "no_supervised_tokens": _no_supervised_tokens(last),
    }


def is_number(value: int | float | None) -> TypeGuard[float]:
    """Whether the value is known and finite."""
    return value is not None and math.isfinite(value)


def _constant_rewards(last: Records) -> str | None:
    means, spreads = _values(last, "reward"), _values(last, "reward_std")
    if len(means) < len(last) or not all_same([*means, *(means[0] + s for s in spreads)]):
        return None
    return (
        f"every reward of the last {len(last)} steps was {means[0]:g}, so rewards have no gradient. Check "
        "in completions.jsonl that the reward function parses the completions, or choose easier prompts"
    )


def _nothing_passes(last: Records, stage: Config) -> str | None:
    """Rewards differ, but the parts of the method that distinguish completions that pass see none."""
    objective, rates = stage.objective, _values(last, "pass_rate")
    multiplies = objective.lambda_adv > 0 and objective.adversarial_placement == "multiply"
    selects = stage.batching.prompt_selection == "informative"
    if len(rates) < len(last) or any(rates) or not any(_values(last, "reward_std")):
        return None
    if not (multiplies or selects or objective.pairs_rollouts):
        return None
    value = f"the value of {objective.pass_reward or 'the first reward function that applies'}"
    return (
        f"no completion of the last {len(last)} steps passed: {value} must be at least "
        f"{objective.pass_threshold:g}. Set objective.pass_threshold to the value of a right answer, choose "
        "another function with objective.pass_reward, or use easier prompts"
    )


def _kl_jump(before: Records, last: Records, growth: float) -> str | None:
    usual, now = _values([*before, *last[:-1]], "kl"), last[-1].get("kl")
    if not usual or not is_number(now) or now <= max(growth * statistics.median(usual), SMALL_KL):
        return None
    return (
        f"the KL to the reference jumped from {statistics.median(usual):.2g} to {now:.2g} nats per token "
        f"(limit: {growth:g} times). Lower optim.learning_rate or optim.max_grad_norm, raise objective.beta, "
        "and check this step's rewards"
    )


def _length_explosion(before: Records, last: Records, growth: float) -> str | None:
    length, earlier = _mean(last, "completions/mean_length"), _mean(before, "completions/mean_length")
    ratio = _mean(last, "completions/length_ratio")
    if length is not None and earlier is not None and length > growth * earlier:
        what = f"from {earlier:.0f} to {length:.0f} tokens within {len(last)} steps"
    elif ratio is not None and ratio > growth and _moved(before, last, "completions/length_ratio", up=True):
        what = f"to {ratio:.1f} times the demonstrations' length"
    else:
        return None
    return (
        f"the completions grew {what} (limit: {growth:g} times); the reward may favor length. Check the "
        "longest in completions.jsonl, bound the length in the reward, or raise objective.lambda_adv"
    )


def _length_collapse(before: Records, last: Records, growth: float) -> str | None:
    ratio = _mean(last, "completions/length_ratio")
    if ratio is None or ratio * growth >= 1 or not _moved(before, last, "completions/length_ratio", up=False):
        return None
    return (
        f"the completions shrank to {ratio:.0%} of the demonstrations' length (limit: 1/{growth:g}); the "
        "reward may pass answers without content. Check the shortest in completions.jsonl, and train on "
        "demonstrations (objective.mu_peak, method uniapl) or add a reward that such answers fail"
    )


def _discriminator_dead(before: Records, last: Records, advantage: float) -> str | None:
    """Length alone separates the pairs better, although the discriminator has trained for a window."""
    accuracy, auc = _mean(last, "discriminator/accuracy"), _mean(last, "completions/length_auc")
    if accuracy is None or auc is None or not _values(before, "discriminator/accuracy"):
        return None
    by_length = 0.5 + abs(auc - 0.5)
    if by_length - accuracy <= advantage:
        return None
    return (
        f"the discriminator is less accurate than length alone (accuracy {accuracy:.2f}; length alone: "
        f"{by_length:.2f}). Raise discriminator.learning_rate or discriminator.updates_per_step, and check "
        "discriminator.freeze_after_steps and discriminator.accuracy_band"
    )


def _discriminator_saturated(last: Records, highest: float) -> str | None:
    accuracies = _values(last, "discriminator/accuracy")
    if len(accuracies) < len(last) or statistics.fmean(accuracies) < highest:
        return None
    return (
        f"the discriminator separates nearly all pairs (accuracy {statistics.fmean(accuracies):.3f}, limit "
        f"{highest:g}), so its signal is weak. Lower discriminator.learning_rate, pause it with "
        "discriminator.accuracy_band, raise objective.mu_peak first, and check that completions and "
        "demonstrations have the same format and end token"
    )


def _divergence(before: Records, last: Records) -> str | None:
    win_rate = _mean(last, "discriminator/win_rate")
    moved = functools.partial(_moved, before, last, errors=DIVERGING)
    if win_rate is None or win_rate <= 0.5 or not moved("discriminator/win_rate", up=True):
        return None
    if moved("reward", up=False):
        what = "the reward falls"
    elif moved("sft/nll", up=True):
        what = "the demonstrations become less likely"
    else:
        return None
    return (
        f"the win rate rose to {win_rate:.2f} while {what}: the policy exploits the discriminator. Lower "
        "objective.lambda_adv, or train the discriminator more (discriminator.freeze_after_steps null, a "
        "higher discriminator.updates_per_step or discriminator.learning_rate); discriminator.min_accuracy "
        "keeps lambda_adv at 0 until it is accurate"
    )


def _multiplier_pinned(before: Records, last: Records, highest: float) -> str | None:
    values = _values(last, "constraint/multiplier")
    if not values or min(values) < highest or not _moved(before, last, "reward", up=False):
        return None
    return (
        f"lambda_adv stays at its upper bound {highest:g} while the reward falls: the constraint cannot be "
        "met. Raise objective.max_expert_gap, raise objective.mu_peak, or lower objective.lambda_bounds"
    )


def _adversary_inactive(last: Records, stage: Config, stage_step: int) -> str | None:
    """The adversary could have acted in each step of the window, but acted in none."""
    settings, first = stage.discriminator, stage_step - len(last)
    if any(step.get("adversary/active") != 0 or "completions/mean_length" not in step for step in last):
        return None
    if first < stage.cold_start_steps:
        return None
    accuracy, newest = last[-1].get("adversary/accuracy"), last[-1]
    if settings.reads_reference and stage_step <= stage.reference_step:
        reason = (
            f"discriminator.kind {settings.kind} reads the KL reference, which does not exist before step "
            f"{stage.reference_step + 1} of the stage. Lower objective.reference_step"
        )
    elif first < stage.adversary_step:
        return None
    elif is_number(accuracy) and not newest["weight/lambda_adv"] and _values(last, "discriminator/win_rate"):
        remedy = (
            "Raise discriminator.learning_rate or discriminator.updates_per_step, or add demonstrations"
            if settings.is_trained
            else "Choose another discriminator"
        )
        reason = (
            f"the discriminator's accuracy is {accuracy:.2f}, below discriminator.min_accuracy "
            f"{settings.min_accuracy:g}. {remedy}, or lower discriminator.min_accuracy"
        )
    else:
        placement = stage.objective.adversarial_placement
        reward = {"loss": "", "reward": "a reward and ", "multiply": "a reward above 0 and "}
        reason = (
            f"no completions had {reward[placement]}a demonstration to be compared "
            "with. Add a 'completion' to the rows with a reward, or set objective.lambda_adv to 0"
        )
    return f"the adversary did not act in the last {len(last)} steps: {reason}"


def _sampler_mismatch(newest: Mapping[str, Any], highest: float) -> str | None:
    """One step is enough. Rollouts of older weights differ by an update, so they are not checked."""
    difference = newest.get("trained/sampling_logp_difference/mean")
    if newest.get("rollout/staleness") or not is_number(difference) or difference <= highest:
        return None
    return (
        f"the log-probabilities of sampler and trainer differ by {difference:.2g} nats per token (limit "
        f"{highest:g}), so gradients do not belong to the sampled policy. Train in fp32 (optim.bf16 false), "
        "try model.attn_implementation eager, and check that the model has no dropout or other noise"
    )


def _tools_unused(last: Records, lowest: float) -> str | None:
    """The metrics of tools exist only in a run that has tools."""
    calls, malformed = _values(last, CALLS), _mean(last, "tools/malformed")
    if len(calls) < len(last) or statistics.fmean(calls) >= lowest:
        return None
    begun = f"; {malformed:.0%} of them end with a call that cannot be read" if malformed else ""
    return (
        f"the completions call {statistics.fmean(calls):.2g} tools on average (limit {lowest:g}){begun}. Add "
        "demonstrations that call them, describe in the prompt when to use them, raise "
        "rollout.temperature, or choose prompts that need them"
    )


def _tools_failing(last: Records, highest: float) -> str | None:
    """The fraction of all calls of the window: a step without calls has no weight."""
    called = [step for step in last if step.get(CALLS)]
    failed = sum(step[CALLS] * (step.get("tools/failure_frequency") or 0.0) for step in called)
    total = sum(step[CALLS] for step in called)
    if not total or failed / total <= highest:
        return None
    return (
        f"{failed / total:.0%} of the tool calls failed (limit {highest:.0%}). Read the results in "
        "completions.jsonl: correct the tool if its exceptions are its own, raise rollout.tool_timeout if "
        "calls take too long, or describe names and arguments better in the tool's docstring"
    )


def _no_supervised_tokens(last: Records) -> str | None:
    weights, tokens = _values(last, "weight/mu"), _values(last, "tokens/sft")
    if not weights or min(weights) <= 0 or max(tokens, default=0) > 0:
        return None
    return (
        f"no demonstration tokens in the last {len(last)} steps, although mu is positive. Check the "
        "completions in the data and objective.gate_threshold"
    )


def _moved(before: Records, last: Records, key: str, *, up: bool, errors: float = SIGNIFICANT) -> bool:
    """Whether the mean moved in this direction by more than this number of standard errors."""
    old, new = _values(before, key), _values(last, key)
    if len(old) < 2 or len(new) < 2:
        return False
    rise = statistics.fmean(new) - statistics.fmean(old)
    error = math.sqrt(statistics.variance(old) / len(old) + statistics.variance(new) / len(new))
    return (rise if up else -rise) > errors * error


def _mean(records: Records, key: str) -> float | None:
    values = _values(records, key)
    return statistics.fmean(values) if values else None


def _values(records: Records, key: str) -> list[float]:
    return [float(value) for record in records if is_number(value := record.get(key))]
