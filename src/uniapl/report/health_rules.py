"""Which health rules had enough steps: `uniapl.training.monitor.health` evaluates them during the run."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from uniapl.config.health import HealthConfig
from uniapl.config.resolve import flatten
from uniapl.report.analysis import number
from uniapl.report.reading import Record, RunData

Settings = Mapping[str, Any]


class Rule(NamedTuple):
    """What a health rule needs before it can fire."""

    metric: str
    """The metric without which it does not apply."""
    windows: int = 1
    """The windows of steps that it reads; 2 if it compares the last one with the one before."""
    every: bool = False
    """Whether each step of the last window must have the metric."""
    applies: Callable[[Settings], bool] = lambda settings: True
    """Whether the rule applies with the settings of a stage, by their keys."""


def _needs_passing(settings: Settings) -> bool:
    value = settings.get
    multiplies = value("objective.lambda_adv") and value("objective.adversarial_placement") == "multiply"
    pairs = value("objective.pref_weight") and value("objective.pref_pairs") == "rollouts"
    return bool(multiplies or pairs or value("batching.prompt_selection") == "informative")


RULES = {
    "zero_advantage": Rule("frac_reward_zero_std"),
    "truncation": Rule("completions/clipped_ratio"),
    "entropy_collapse": Rule("rollout/entropy_estimate"),
    "constant_rewards": Rule("reward", every=True),
    "nothing_passes": Rule("pass_rate", every=True, applies=_needs_passing),
    "kl_jump": Rule("kl"),
    "length_explosion": Rule("completions/mean_length", windows=2),
    "length_collapse": Rule("completions/length_ratio", windows=2),
    "discriminator_dead": Rule(
        "discriminator/accuracy",
        windows=2,
        applies=lambda settings: settings.get("discriminator.kind") == "bradley-terry",
    ),
    "discriminator_saturated": Rule("discriminator/accuracy", every=True),
    "divergence": Rule("discriminator/win_rate", windows=2),
    "multiplier_pinned": Rule("constraint/multiplier", windows=2),
    "adversary_inactive": Rule("adversary/active", every=True),
    "sampler_mismatch": Rule("trained/sampling_logp_difference/mean"),
    "tools_unused": Rule("tools/call_frequency", every=True),
    "tools_failing": Rule("tools/call_frequency"),
    "no_supervised_tokens": Rule(
        "weight/mu", applies=lambda settings: bool(settings.get("objective.mu_peak"))
    ),
}


def unevaluated(run: RunData) -> tuple[list[str], bool]:
    """The rules that apply to the run but had too few steps in each stage, and whether these are all."""
    stages: dict[int, list[Record]] = {}
    for record in run.metrics:
        if record["step"]:
            stages.setdefault(record.get("stage") or 0, []).append(record)
    settings = [flatten(dict(stage)) for stage in run.config.get("stages") or [run.config]]
    fired = {key.removeprefix("health/") for key in run.keys("health/")}
    names: dict[str, bool] = {}
    for name, rule in RULES.items():
        for stage, records in stages.items():
            own = settings[min(stage, len(settings) - 1)]
            if rule.applies(own) and any(_has(rule, records)):
                names[name] = names.get(name, name in fired) or _evaluated(rule, records, window(own))
    return [name for name, evaluated in names.items() if not evaluated], not any(names.values())


def window(settings: Settings) -> int:
    """The steps over which the rules of a stage are evaluated."""
    return int(settings.get("health.window", HealthConfig().window))


def _evaluated(rule: Rule, records: Sequence[Record], size: int) -> bool:
    """Whether the rule could fire in the last of a stage's steps."""
    if len(records) < rule.windows * size:
        return False
    last = _has(rule, records[-size:])
    before = _has(rule, records[-2 * size : -size])
    return (all(last) if rule.every else any(last)) and (rule.windows == 1 or any(before))


def _has(rule: Rule, records: Sequence[Record]) -> list[bool]:
    """Whether each step has the metric of the rule."""
    return [number(record.get(rule.metric)) is not None for record in records]
