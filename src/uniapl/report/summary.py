"""The words and tables of a report: state, results, health, settings."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from uniapl.config import Config
from uniapl.config.resolve import flatten
from uniapl.report.adversary import AdversaryEffect
from uniapl.report.analysis import decimal, ends, mean, number, step_ranges
from uniapl.report.evaluations import ARROW, ends_of, main_scores
from uniapl.report.reading import RunData, step_phases
from uniapl.tolerance import at_least, same

STATES = {
    "finished": ("good", "finished"),
    "stopped": ("bad", "stopped by a health rule"),
    "interrupted": ("open", "interrupted"),
    None: ("open", "no end recorded: still running, or killed"),
}
SKIPPED = {
    "skipped": "The policy's update was not finite and was not applied.",
    "discriminator/skipped": "The discriminator's update was not finite and was not applied.",
}


def state(run: RunData) -> dict[str, str]:
    """The state of the run: {"kind": "good" | "bad" | "open", "text", "message"}."""
    end_state = run.end_state or {}
    kind, words = STATES.get(end_state.get("state"), STATES[None])
    reasons = [
        f"Stage {record['stage'] + 1} ended at step {record['step']}: {record['early_stopping/reason']}."
        for record in run.metrics
        if record.get("early_stopping/reason")
    ]
    text = f"{words}, step {run.steps[-1]:,} of {run.planned_steps:,}"
    return {
        "kind": kind,
        "text": text,
        "message": " ".join([*reasons, end_state.get("message") or ""]).strip(),
    }


def results(run: RunData) -> list[dict[str, str]]:
    """What the verdict puts into words, as {"label", "value"}; results without values are left out."""
    values = {
        "Reward": _change(run, "reward"),
        **{key.removeprefix("eval/"): _evaluated(run, key) for key in main_scores(run)},
        "Demonstration NLL": _change(run, "sft/nll"),
        "Steps in which the adversary acted": AdversaryEffect.of(run.metrics).acted,
    }
    return [{"label": label, "value": value} for label, value in values.items() if value is not None]


def tiles(run: RunData) -> list[dict[str, str]]:
    """The other results as {"label", "value", "detail"}; results without values are left out."""
    values = [
        ("Completions with reward 1", _solved(run), "first and last steps"),
        (
            "Win rate",
            _change(run, "discriminator/win_rate"),
            "0.5: not distinguishable from the demonstrations",
        ),
    ]
    policy, expert = (
        mean(ends(_known(run, key))[1]) for key in ("completions/mean_length", "expert/mean_length")
    )
    if policy is not None:
        compared = f"; demonstrations {expert:.1f}" if expert is not None else ""
        values.append(("Completion length", f"{policy:.1f}", f"tokens, last steps{compared}"))
    if (tokens := run.series("num_tokens")[-1]) is not None:
        values.append(("Tokens", f"{tokens:,}", "prompts and completions"))
    values.append(("Time", duration(run.series("seconds")[-1] or 0.0), _phases(run)))
    return [
        {"label": a, "value": value, "detail": detail} for a, value, detail in values if value is not None
    ]


def _known(run: RunData, key: str) -> list[float | int]:
    return [value for value in run.series(key) if value is not None]


def _change(run: RunData, key: str) -> str | None:
    """The means of the first and the last steps that have the metric."""
    first, last = (mean(part) for part in ends(_known(run, key)))
    return None if first is None or last is None else f"{decimal(first)}{ARROW}{decimal(last)}"


def _evaluated(run: RunData, key: str) -> str:
    (_, first), (_, last) = ends_of(run, key)
    return f"{decimal(first)}{ARROW}{decimal(last)}"


def _solved(run: RunData) -> str | None:
    """The fractions of completions with reward 1, if all rewards are from 0 to 1."""
    rewards = [
        (record["step"], reward)
        for record in run.completions
        for completion in record["completions"]
        if (reward := number(completion["reward"])) is not None
    ]
    if not all(at_least(reward, 0) and at_least(1, reward) for _, reward in rewards):
        return None
    steps = [set(part) for part in ends([*dict.fromkeys(step for step, _ in rewards)])]
    parts = [[same(reward, 1) for step, reward in rewards if step in part] for part in steps]
    return ARROW.join(f"{decimal(100 * sum(part) / len(part), 1)}%" for part in parts) if all(parts) else None


def _phases(run: RunData) -> str:
    """The fractions of the time that the phases took, largest first."""
    spent = {phase: sum(v or 0.0 for v in run.series(key)) for key, phase in step_phases(run).items()}
    total = sum(spent.values())
    largest = sorted(spent.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in largest)


def duration(seconds: float) -> str:
    """A duration for people: 3725.0 is "1 h 2 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def health(run: RunData) -> list[dict[str, str]]:
    """Each rule that warned and each kind of skipped update: {"rule", "steps", "message"}."""
    messages = {str(warning.get("rule")): str(warning.get("message")) for warning in run.warnings}
    rules = [
        {"rule": rule, "steps": step_ranges(steps), "message": messages.get(rule, "")}
        for rule, steps in warned_steps(run).items()
    ]
    return rules + [
        {"rule": f"{key} ({len(steps)})", "steps": step_ranges(steps), "message": SKIPPED[key]}
        for key, steps in skipped_steps(run).items()
    ]


def warned_steps(run: RunData) -> dict[str, list[int]]:
    """The steps in which each rule that warned fired."""
    fired = {key.removeprefix("health/"): _steps_with(run, key) for key in run.keys("health/")}
    return {str(warning.get("rule")): [] for warning in run.warnings} | fired


def skipped_steps(run: RunData) -> dict[str, list[int]]:
    """The steps without an update, by the metric that marks them; metrics that mark none are left out."""
    return {key: steps for key in SKIPPED if (steps := _steps_with(run, key))}


def _steps_with(run: RunData, key: str) -> list[int]:
    return [step for step, value in zip(run.steps, run.series(key), strict=True) if value]


def settings(run: RunData) -> list[dict[str, Any]]:
    """Every value of config.yaml, its default, and its source if the manifest names it."""
    sources = run.manifest.get("sources", {})
    defaults = flatten(Config().model_dump(mode="json"))
    stages: Sequence[Mapping[str, Any]] = run.config.get("stages") or []
    values = flatten({key: value for key, value in run.config.items() if key != "stages"})
    rows = [(key, key, value, sources.get(key, "")) for key, value in values.items()]
    for count, stage in enumerate(stages, start=1):
        rows += [(f"stages.{count}.{key}", key, value, "") for key, value in flatten(dict(stage)).items()]
    return [
        {
            "key": shown,
            "value": _shown(value),
            "default": _shown(defaults.get(key)),
            "changed": value != defaults.get(key),
            "source": source,
        }
        for shown, key, value, source in rows
    ]


def differing_settings(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """The keys whose values differ between runs, with a value per run."""
    columns = [{row["key"]: row["value"] for row in settings(run)} for run in runs]
    keys = dict.fromkeys(key for column in columns for key in column)
    return [
        {"key": key, "values": [column.get(key, "") for column in columns]}
        for key in keys
        if len({column.get(key) for column in columns}) > 1
    ]


def provenance(run: RunData) -> list[tuple[str, str]]:
    """Model, data, seed, versions and commit."""
    data = run.manifest.get("data", {})
    left_out = [f"{count} rows left out, {reason}" for reason, count in data.get("left_out", {}).items()]
    rows = {
        "model": run.manifest.get("model"),
        "data": data.get("path") or "rows passed from Python",
        "examples": ", ".join([f"{data['examples']:,}", *left_out]) if "examples" in data else None,
        "data, SHA-256": data.get("sha256"),
        "seed": run.config.get("seed"),
        **run.manifest.get("versions", {}),
        "git commit": run.manifest.get("git_commit"),
    }
    return [(key, str(value)) for key, value in rows.items() if value is not None]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
