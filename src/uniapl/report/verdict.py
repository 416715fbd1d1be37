"""The verdict of a run in words: how it ended, what it learned, its health, and what the adversary did."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from uniapl.report.adversary import AdversaryEffect
from uniapl.report.analysis import change, decimal, ends, mean, number
from uniapl.report.charts import function_name
from uniapl.report.evaluations import evaluation_sentence
from uniapl.report.health_rules import unevaluated
from uniapl.report.reading import RunData
from uniapl.report.summary import skipped_steps, state, warned_steps
from uniapl.tolerance import all_same

Item = dict[str, Any]
"""{"kind": "good" | "warn" | "bad" | "open", "label", "texts": [sentences]}."""

MEASURES = {
    "reward": ("The reward", 1),
    "rewards/accuracies": ("The accuracy on preference pairs", 1),
    "loss/teacher": ("The KL to the teacher", -1),
    "sft/nll": ("The nll of the demonstrations", -1),
}
"""The metrics that show what a run learned, the main one first, and the sign of an improvement."""
NO_GRADIENT = 1e-6
"""A gradient's norm up to this value is rounding. Our choice."""


def verdict(run: RunData) -> list[Item]:
    """How the run ended, whether it learned, whether it is healthy, and what the adversary did."""
    ended = state(run)
    texts = [f"{_capital(ended['text'])}.", *filter(None, [_capital(ended["message"])])]
    return [
        {"kind": ended["kind"], "label": "End", "texts": texts},
        learning(run),
        health_of(run),
        *adversary(run),
    ]


def learning(run: RunData) -> Item:
    """Whether reward, demonstrations and evaluation improved, and which reward functions are constant."""
    if (reason := without_gradient([record for record in run.metrics if record["step"]])) is not None:
        found = [("bad", f"{_capital(reason)}.")]
    else:
        found = [one for key in MEASURES if (one := _moved(run, key)) is not None]
    if (evaluated := evaluation_sentence(run)) is not None:
        text, fell = evaluated
        found.append(("bad" if fell else "open", text))
    found += [("warn", text) for text in _constant_functions(run)]
    found = found or [("open", "The run has no reward, no demonstrations and no evaluation.")]
    kinds = [kind for kind, _ in found]
    kind = "warn" if {"bad", "warn"} & {*kinds} else "good" if "good" in kinds else "open"
    return {
        "kind": "bad" if kinds[0] == "bad" else kind,
        "label": "Learning",
        "texts": [text for _, text in found],
    }


def without_gradient(records: Sequence[Mapping[str, Any]]) -> str | None:
    """Why a run did not change its model; None if any of its steps had a gradient.

    Args:
        records: All steps of the run.
    """
    norms = [number(record.get("grad_norm")) for record in records]
    if not records or any(norm is None or norm > NO_GRADIENT for norm in norms):
        return None
    ties, rewards = (
        [value for record in records if (value := number(record.get(key))) is not None]
        for key in ("frac_reward_zero_std", "reward")
    )
    found = "no step had a gradient, so the model has not learned anything"
    if ties and min(ties) == 1:
        return (
            f"{found}: all completions of a prompt had the same reward in every step (mean "
            f"{statistics.fmean(rewards):.3f}). Look at the rewards in completions.jsonl, and use easier or "
            "harder prompts, a graded reward, or demonstrations"
        )
    return f"{found}: see tokens/, weight/ and groups/mixed in metrics.jsonl for what each step trained on"


def _moved(run: RunData, key: str) -> tuple[str, str] | None:
    """Whether a metric improved, with the numbers in words; None if no step has it."""
    (subject, sign), values = MEASURES[key], [value for value in run.series(key) if value is not None]
    if not values:
        return None
    steps = f"{len(values):,} step{'s' if len(values) > 1 else ''}"
    if key == "reward" and (constant := _constant(run, key, "reward_std")) is not None:
        text = (
            f"Every reward of {steps} was {constant:g}, so the rewards did not distinguish the completions."
        )
        return "bad", text
    parts = ends(values)
    first, last = (statistics.fmean(part) for part in parts)
    numbers, found = f"from {decimal(first)} to {decimal(last)}", change(values)
    low, high = found["low"], found["high"]
    if low is None or high is None:
        return "open", f"{subject} went {numbers} in {steps}, too few to distinguish a change from noise."
    moved = (low > 0) - (high < 0)
    verb = {1: "rose", -1: "fell", 0: "did not change significantly:"}[moved]
    interval = f"95 % interval {decimal(low, sign='+')} to {decimal(high, sign='+')}"
    means = f"means of the first and the last {len(parts[0])} of {steps}"
    details = f"{means}; change {decimal(last - first, sign='+')}, {interval}"
    kind = {1: "good", -1: "bad", 0: "open"}[moved * sign]
    return kind, f"{subject} {verb} {numbers} ({details})."


def _constant_functions(run: RunData) -> list[str]:
    """Each reward function that had the same value for every completion; a single one is the reward."""
    keys = [key for key in run.keys("rewards/") if key.endswith("/mean")]
    found = {key: _constant(run, key, f"{key.removesuffix('mean')}std") for key in keys if len(keys) > 1}
    return [
        f"The reward function {function_name(key)} was {value:g} for every completion."
        for key, value in found.items()
        if value is not None
    ]


def _constant(run: RunData, means: str, deviations: str) -> float | None:
    """The value that all completions of all steps have; None if they differ or there is none."""
    pairs = zip(run.series(means), run.series(deviations), strict=True)
    values = [value for mean, std in pairs if mean is not None for value in (mean, mean + (std or 0))]
    return values[0] if values and all_same(values) else None


def health_of(run: RunData) -> Item:
    """The rules that warned, the updates that were not applied, and the rules that had too few steps."""
    rules = warned_steps(run)
    skipped = sum(map(len, skipped_steps(run).values()))
    texts: list[str] = []
    if rules:
        listed = ", ".join(_with_steps(rule, steps) for rule, steps in rules.items())
        texts.append(f"{len(rules)} rule{'s' if len(rules) > 1 else ''} warned: {listed}.")
    if skipped:
        texts.append(f"{skipped:,} update{'s were' if skipped > 1 else ' was'} not applied.")
    missing, all_missing = unevaluated(run)
    window = run.config.get("health", {}).get("window")
    if not texts and not all_missing:
        texts.append("No rule warned, and every update was applied.")
    if all_missing and missing:
        texts.append(f"The run is too short for the health rules, which read {window} steps (health.window).")
    elif missing:
        texts.append(f"Not evaluated, because the run is too short: {', '.join(missing)}.")
    stopped = state(run)["kind"] == "bad"
    kind = "bad" if stopped else "warn" if rules or skipped else "open" if all_missing else "good"
    return {"kind": kind, "label": "Health", "texts": texts}


def _with_steps(rule: str, steps: Sequence[int]) -> str:
    if not steps:
        return rule
    count = f"{len(steps):,} step{'s' if len(steps) > 1 else ''}"
    return f"{rule} (in {count}, first in step {steps[0]:,})"


def adversary(run: RunData) -> list[Item]:
    """In how many steps the adversary acted, and by how much; empty for a run without one."""
    effect = AdversaryEffect.of(run.metrics)
    if effect.sentence is None:
        return []
    texts = [f"{_capital(effect.sentence)}."]
    active = [r for r in run.metrics if r.get("adversary/active") == 1]
    weight = mean(number(record.get("weight/lambda_adv")) for record in active)
    if weight is not None and not effect.changes:
        texts.append(f"Its weight lambda was {weight:.2f} on average in these steps.")
    if not effect.rollout_steps:
        kind = "open"
    elif not effect.active_steps:
        kind = "bad"
    else:
        kind = "good" if 2 * effect.active_steps >= effect.rollout_steps else "warn"
    return [{"kind": kind, "label": "Adversary", "texts": texts}]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
