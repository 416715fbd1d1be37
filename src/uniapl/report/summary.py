"""What the page says in words and tables: state, results, health, settings."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from uniapl.config import Config
from uniapl.config.resolve import flatten
from uniapl.report.analysis import ends, mean, number, step_ranges
from uniapl.report.charts import phase_of
from uniapl.report.reading import RunData

ARROW = " → "
STATES = {
    "finished": ("good", "finished"),
    "stopped": ("bad", "stopped by a health rule"),
    "interrupted": ("open", "interrupted"),
    None: ("open", "no end recorded: it still runs, or was killed"),
}
SKIPPED = {
    "skipped": "The policy's update was not finite and was not applied.",
    "discriminator/skipped": "The discriminator's update was not finite and was not applied.",
}


def state(run: RunData) -> dict[str, str]:
    """How the run stands: {"kind": "good" | "bad" | "open", "text", "message"}."""
    ending = run.ending or {}
    kind, words = STATES.get(ending.get("state"), STATES[None])
    reasons = [
        f"Stage {record['stage'] + 1} ended at step {record['step']}: {record['early_stopping/reason']}."
        for record in run.metrics
        if record.get("early_stopping/reason")
    ]
    text = f"{words}, step {run.steps[-1]:,} of {run.planned_steps:,}"
    return {"kind": kind, "text": text, "message": " ".join([*reasons, ending.get("message") or ""]).strip()}


def tiles(run: RunData) -> list[dict[str, str]]:
    """The result in a few figures, each with a label and what it is; only those that the run has."""
    found: list[dict[str, str]] = []

    def add(label: str, value: str | None, detail: str) -> None:
        if value is not None:
            found.append({"label": label, "value": value, "detail": detail})

    def from_to(key: str) -> str | None:
        first, last = (mean(part) for part in ends(run.series(key)))
        return None if first is None or last is None else f"{first:.3f}{ARROW}{last:.3f}"

    tenths = "first and last tenth of the steps"
    add("Reward", from_to("reward"), tenths)
    add("Answers with reward 1", _solved(run), tenths)
    for key in run.keys("eval/"):
        if key.endswith(("/reward", "/prompt_strict")):
            values = [value for value in run.series(key) if value is not None]
            detail = "first and last look, held out"
            add(key.removeprefix("eval/"), f"{values[0]:.3f}{ARROW}{values[-1]:.3f}", detail)
    add("Expert's nll", from_to("sft/nll"), f"nats per token, {tenths}")
    add("Win rate", from_to("discriminator/win_rate"), "0.5: not to be told from the expert")
    policy, expert = (
        mean(ends(run.series(key))[1]) for key in ("completions/mean_length", "expert/mean_length")
    )
    if policy is not None:
        beside = f", the expert's {expert:.1f}" if expert is not None else ""
        add("Length of answers", f"{policy:.1f}", f"tokens, last tenth{beside}")
    tokens = run.series("num_tokens")[-1]
    add("Tokens", None if tokens is None else f"{tokens:,}", "that losses were computed on")
    add("Time", duration(run.series("seconds")[-1] or 0.0), phases(run))
    return found


def phases(run: RunData) -> str:
    """Where the time went, the largest shares first."""
    columns = {phase: run.series(key) for key in run.keys("time/") if (phase := phase_of(key))}
    spent = {phase: sum(value or 0.0 for value in seconds) for phase, seconds in columns.items()}
    total = sum(spent.values())
    largest = sorted(spent.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in largest if seconds >= 0.01 * total)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 3725.0 is "1 h 2 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def health(run: RunData) -> list[dict[str, str]]:
    """Each rule that warned and each kind of skipped update: name, the steps, and what was said of it."""
    said: dict[str, list[str]] = {}
    for warning in run.warnings:
        said.setdefault(str(warning.get("rule")), []).append(str(warning.get("message")))
    fired = {key.removeprefix("health/"): _steps_with(run, key) for key in run.keys("health/")}
    rules = [
        {"rule": rule, "steps": step_ranges(fired.get(rule, [])), "message": said.get(rule, [""])[-1]}
        for rule in dict.fromkeys([*fired, *said])
    ]
    for key, message in SKIPPED.items():
        if steps := _steps_with(run, key):
            rules.append({"rule": f"{key} ({len(steps)})", "steps": step_ranges(steps), "message": message})
    return rules


def settings(run: RunData) -> list[dict[str, Any]]:
    """Every value of config.yaml, its default, and where it came from if the manifest says so."""
    sources = run.manifest.get("sources", {})
    defaults = flatten(Config().model_dump(mode="json"))
    stages: Sequence[Mapping[str, Any]] = run.config.get("stages") or []
    rows = [
        _setting(key, value, defaults.get(key), sources.get(key, ""))
        for key, value in flatten({k: v for k, v in run.config.items() if k != "stages"}).items()
    ]
    for count, stage in enumerate(stages, start=1):
        rows += [
            _setting(f"stages.{count}.{key}", value, defaults.get(key), "")
            for key, value in flatten(dict(stage)).items()
        ]
    return rows


def differing_settings(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """The keys on which several runs do not agree, with a value per run."""
    columns = [{row["key"]: row["value"] for row in settings(run)} for run in runs]
    keys = dict.fromkeys(key for column in columns for key in column)
    return [
        {"key": key, "values": [column.get(key, "") for column in columns]}
        for key in keys
        if len({column.get(key) for column in columns}) > 1
    ]


def provenance(run: RunData) -> list[tuple[str, str]]:
    """Model, data, versions, seed and commit."""
    data = run.manifest.get("data", {})
    left_out = [f"{count} rows left out, {reason}" for reason, count in data.get("left_out", {}).items()]
    rows = {
        "model": run.manifest.get("model"),
        "data": data.get("path") or "rows given from Python",
        "examples": ", ".join([f"{data['examples']:,}", *left_out]) if "examples" in data else None,
        "data, SHA-256": data.get("sha256"),
        "seed": run.config.get("seed"),
        **run.manifest.get("versions", {}),
        "git commit": run.manifest.get("git_commit"),
    }
    return [(key, str(value)) for key, value in rows.items() if value is not None]


def _steps_with(run: RunData, key: str) -> list[int]:
    return [step for step, value in zip(run.steps, run.series(key), strict=True) if value]


def _solved(run: RunData) -> str | None:
    """The share of answers with reward 1, where rewards go from 0 to 1."""
    answers = [
        (record["step"], reward)
        for record in run.completions
        for answer in record["completions"]
        if (reward := number(answer["reward"])) is not None
    ]
    if not answers or not all(0 <= reward <= 1 for _, reward in answers):
        return None
    first, last = (set(part) for part in ends(run.steps))
    known = [[reward == 1 for step, reward in answers if step in part] for part in (first, last)]
    return ARROW.join(f"{sum(part) / len(part):.1%}" for part in known) if all(known) else None


def _setting(key: str, value: Any, default: Any, source: str) -> dict[str, Any]:
    return {
        "key": key,
        "value": _shown(value),
        "default": _shown(default),
        "changed": value != default,
        "source": source,
    }


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
