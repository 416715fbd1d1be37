"""Scores before and after training: the evaluations of a run, and the measurements of the demo."""

from collections.abc import Mapping, Sequence
from typing import Any

from uniapl.report.analysis import decimal, number
from uniapl.report.reading import BEST, MEASUREMENTS, RunData

ARROW = " → "
MAX_NAMED = 4
"""Scores that the verdict names; the table has all of them."""
COUNTS = ("unscored", "truncated", "malformed", "unanswered", "failure_frequency", "call_frequency")
"""Scores that are shown only if they are not always 0."""


def main_scores(run: RunData) -> list[str]:
    """The metric of each suite's main score, and each metric of the user's own evaluation."""
    suites: dict[str, list[str]] = {}
    for key in run.keys("eval/"):
        suite, slash, score = key.removeprefix("eval/").partition("/")
        suites.setdefault(f"eval/{suite}{slash}", []).append(score)
    metrics = run.config.get("evaluation", {}).get("metrics", ())
    wanted = (*(name.rpartition(":")[2] for name in metrics[:1]), "prompt_strict", "reward", "")
    chosen = {
        suite: next((name for name in wanted if name in found), None) for suite, found in suites.items()
    }
    return [f"{suite}{score}" for suite, score in chosen.items() if score is not None]


def ends_of(run: RunData, key: str) -> tuple[tuple[int, float], tuple[int, float]]:
    """The steps and values of the first evaluation, and of that of the model that is the result."""
    known = [
        (step, value) for step, value in zip(run.steps, run.series(key), strict=True) if value is not None
    ]
    best = (run.files.get(BEST) or {}).get("step")
    return known[0], next((one for one in known if one[0] == best), known[-1])


def evaluation_sentence(run: RunData) -> tuple[str, bool] | None:
    """The main scores in words, and whether one of them fell; None without an evaluation."""
    found = {key.removeprefix("eval/"): ends_of(run, key) for key in main_scores(run)}
    if not found:
        return None
    (start, _), (end, _) = next(iter(found.values()))
    when = f"from {f'step {start:,}' if start else 'the base model'} to step {end:,}"
    when = f"at step {end:,}" if start == end else when
    shown = [
        f"{name} {decimal(last)}" if start == end else f"{name} {decimal(first)}{ARROW}{decimal(last)}"
        for name, ((_, first), (_, last)) in [*found.items()][:MAX_NAMED]
    ]
    more = f"; the table has {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    fell = any(last < first for (_, first), (_, last) in found.values())
    return f"Evaluation {when}: {', '.join(shown)}{more}.", fell


def tables(run: RunData) -> list[dict[str, Any]]:
    """Evaluations and measurements: {"title", "header", "rows": [{"name", "meaning", "values"}], "note"}."""
    groups: dict[tuple[int, int], list[str]] = {}
    for key in run.keys("eval/"):
        if key.endswith(COUNTS) and not any(run.series(key)):
            continue
        first, last = ends_of(run, key)
        groups.setdefault((first[0], last[0]), []).append(key)
    found = [_evaluations(run, *steps, keys) for steps, keys in groups.items()]
    measured = run.files.get(MEASUREMENTS)
    return found + ([_measurements(measured)] if measured else [])


def _evaluations(run: RunData, start: int, end: int, keys: Sequence[str]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for key in keys:
        (_, first), (_, last) = ends_of(run, key)
        values = (
            [decimal(last)]
            if start == end
            else [decimal(first), decimal(last), decimal(last - first, 3, "+")]
        )
        rows.append({"name": key.removeprefix("eval/"), "meaning": "", "values": values})
    best = number((run.files.get(BEST) or {}).get("step"))
    result = f"step {end:,}{', best' if end == best else ''}"
    return {
        "title": "Evaluation",
        "header": [result]
        if start == end
        else [f"step {start:,}" if start else "base", result, "difference"],
        "rows": rows,
        "note": "With eval_on_start: true, the table has the base model too." if start else "",
    }


def _measurements(found: Mapping[str, Any]) -> dict[str, Any]:
    return {"title": found["title"], "header": found["models"], "rows": found["rows"], "note": ""}
