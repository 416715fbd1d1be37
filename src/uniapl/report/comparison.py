"""The page of a comparison: the results of `uniapl compare` as a verdict, tables and charts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from uniapl.errors import UsageError
from uniapl.files import write_text
from uniapl.report.analysis import decimal, interval_text, rounded
from uniapl.report.charts import Chart, line_chart
from uniapl.report.page import fill

RESULTS = "results.json"
FORMAT = 3
"""Version of results.json that this page shows."""
NLL = "nats per token of the expert's completions"
MEASURES = {
    "expert_nll": "expert nll",
    "length_distance": "length distance, tokens",
    "logprob_distance": "log-probability distance, nats",
    "judge": "judge",
    "on_topic": "on topic",
    "distinct_2": "distinct-2",
    "truncated": "truncated",
    "tokens": "mean length, tokens",
    "calls": "tool calls",
    "failed": "failed calls",
    "malformed": "malformed calls",
    "unanswered": "unanswered calls",
}
"""Measures and their names."""
CURVES = {
    "score": "Score over rollout tokens",
    "judge": "Judged similarity over rollout tokens",
    "on_topic": "Completions on topic over rollout tokens",
    "tokens": "Length over rollout tokens",
    "entropy": "Entropy over rollout tokens",
}


def is_comparison(directory: Path) -> bool:
    """Whether `uniapl compare` wrote the directory."""
    return (directory / RESULTS).is_file() and not (directory / "metrics.jsonl").exists()


def write_comparison(directory: Path, output: Path) -> None:
    """Read results.json and write its page.

    Raises:
        UsageError: `uniapl compare` did not write results.json.
    """
    path = directory / RESULTS
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if summary.get("format") != FORMAT:
            raise UsageError(
                f"'{path}' was not written by uniapl compare, or by another version: run uniapl compare again"
            )
        page = render_comparison(summary, title=directory.resolve().name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"'{path}' was not written by uniapl compare: {error!r}") from error
    write_text(output, page)


def render_comparison(summary: Mapping[str, Any], *, title: str) -> str:
    """The page: the verdict first, then the tables and charts."""
    charts = [_closeness(summary["methods"], summary["main"])]
    charts += [_front(name, front) for name, front in summary["fronts"].items()]
    themes: list[dict[str, Any]] = [{"title": "Score and closeness to the expert", "charts": charts}]
    if summary["curves"]:
        themes.append({"title": "Quality over cost", "charts": _curves(summary["curves"])})
    return fill(
        "comparison",
        title=title,
        introduction=_introduction(summary),
        verdict=summary["verdict"],
        recommended=summary.get("recommended", {}).get("method"),
        tables=list(_tables(summary)),
        chosen={label: row["settings"] for label, row in summary["methods"].items() if row["settings"]},
        found=summary["search"],
        data={"themes": themes, "analyses": [], "stages": []},
    )


def _introduction(summary: Mapping[str, Any]) -> str:
    budget, main = summary["budget"], summary["main"]
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    return (
        f"Methods on {summary['recipe']}, seeds {', '.join(map(str, summary['seeds']))}, compared by "
        f"{main['score']} "
        f"on the suite {main['suite']}. The budget of each method is {budget['rollouts']:,} rollouts and "
        f"{budget['demonstrations']:,} demonstrations; a method without rollouts gets as many "
        "demonstrations in their "
        "place, and one without demonstrations gets none. Square brackets: 95 % intervals of the "
        "mean over seeds, and "
        "of differences over paired seeds (Student's t); prompt s.e.: the standard error of the mean "
        "over the prompts "
        f"of the suite within a seed. Completions are sampled at temperature "
        f"{summary['temperature']:g}. {versions}."
    )


def _tables(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    scores = _scores_tables(summary)
    tables = [_main_table(summary), _measures_table(summary), *scores, _costs_table(summary)]
    if any(row["warnings"] for row in summary["methods"].values()):
        tables.append(_warnings_table(summary))
    if summary["fronts"]:
        tables.append(_front_table(summary["fronts"]))
    return tables


def _main_table(summary: Mapping[str, Any]) -> dict[str, Any]:
    best, score = summary["best"], summary["main"]["score"]
    rows = [
        [
            label,
            decimal(row["measures"]["score"]["mean"]),
            "" if label == best else interval_text(row["minus_best"]["score"], "+"),
            decimal(row["measures"]["expert_nll"]["mean"]),
            decimal(row["measures"]["length_distance"]["mean"], 2),
            *([decimal(row["measures"]["judge"]["mean"])] if "judge" in row["measures"] else []),
            f"{row['cost']['seconds']:,.0f}",
        ]
        for label, row in summary["methods"].items()
    ]
    judge = ["judge"] if "judge" in summary["methods"][best]["measures"] else []
    header = ["method", score, f"minus {best}", "expert nll", "length distance", *judge, "seconds"]
    return {"title": "Methods", "header": header, "rows": rows, "main": True}


def _measures_table(summary: Mapping[str, Any]) -> dict[str, Any]:
    methods = summary["methods"]
    names = [name for name in MEASURES if name in methods[summary["best"]]["measures"]]
    rows = [
        [label, *(_interval(row["measures"].get(name)) for name in names)] for label, row in methods.items()
    ]
    return {"title": "Measures", "header": ["method", *(MEASURES[name] for name in names)], "rows": rows}


def _scores_tables(summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One table per suite."""
    methods = summary["methods"]
    for suite, named in methods[summary["best"]]["scores"].items():
        rows = [
            [label, *(_with_error(row["scores"][suite].get(name)) for name in named)]
            for label, row in methods.items()
        ]
        yield {"title": f"Scores on {suite} (prompt s.e.)", "header": ["method", *named], "rows": rows}


def _costs_table(summary: Mapping[str, Any]) -> dict[str, Any]:
    counts = ["steps", "rollouts", "demonstrations"]
    header = ["method", *counts, "rollout tokens", "trained tokens", "FLOPs", "seconds"]
    rows = [
        [
            label,
            *(f"{row[key]:,}" for key in counts),
            *(f"{row['cost'][key]:,.0f}" for key in ("rollout_tokens", "trained_tokens")),
            f"{row['cost']['flops']:.3g}",
            f"{row['cost']['seconds']:,.0f}",
        ]
        for label, row in summary["methods"].items()
    ]
    return {"title": "Budget and cost of a run", "header": header, "rows": rows}


def _warnings_table(summary: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        [label, rule, f"{len(steps)} of {len(summary['seeds'])}", ", ".join(map(str, steps))]
        for label, row in summary["methods"].items()
        for rule, steps in row["warnings"].items()
    ]
    header = ["method", "health rule", "seeds", "first fired in step"]
    return {"title": "Warnings during training", "header": header, "rows": rows}


def _front_table(fronts: Mapping[str, Any]) -> dict[str, Any]:
    best = next(iter(fronts.values()))["best_front"]
    rows = [
        [name, _interval(front["score_at_equal_closeness"]), _interval(front["minus_best_front"], sign="+")]
        for name, front in fronts.items()
    ]
    return {"title": "Fronts", "header": ["swept", "score at equal closeness", f"minus {best}"], "rows": rows}


def _closeness(methods: Mapping[str, Any], main: Mapping[str, str]) -> Chart:
    lines = [_points(label, [(label, row["measures"])]) for label, row in methods.items()]
    note = (
        "Higher is better, further left is closer to the expert; lines at a point are its 95 % "
        "intervals over "
        "seeds (Student's t)."
    )
    title = f"{main['score']} and expert nll"
    return line_chart(title, lines, kind="points", x=NLL, note=note) | {"y": main["score"]}


def _front(name: str, front: Mapping[str, Any]) -> Chart:
    points = [(f"{point['value']}", point) for point in front["points"]]
    note = "Labels are values of the swept setting. Higher is better, further left is closer to the expert."
    return line_chart(f"Front of {name}", [_points(name, points)], kind="points", x=NLL, note=note)


def _points(label: str, points: Sequence[tuple[str, Mapping[str, Any]]]) -> Chart:
    """A line of points by expert nll and score, with their intervals."""
    sides = ("mean", "low", "high")
    found: Chart = {"label": label, "names": [name for name, _ in points]}
    for measure, names in (("expert_nll", ("x", "xlow", "xhigh")), ("score", ("y", "low", "high"))):
        for name, side in zip(names, sides, strict=True):
            found[name] = [rounded(values[measure][side]) for _, values in points]
    return found


def _curves(curves: Mapping[str, Any]) -> list[Chart]:
    charts: list[Chart] = []
    for name, title in CURVES.items():
        lines: list[dict[str, Any]] = []
        for label, curve in curves.items():
            values = zip(curve["rollout_tokens"], curve.get(name, ()), strict=False)
            known = [(tokens, rounded(value)) for tokens, value in values if value is not None]
            if known and max(curve["rollout_tokens"]) > 0:
                lines.append({"label": label, "x": [x for x, _ in known], "y": [y for _, y in known]})
        if lines:
            note = "Means over seeds; methods without rollouts have no line."
            charts.append(line_chart(title, lines, x="rollout tokens", note=note))
    return charts


def _interval(value: Mapping[str, float | None] | None, *, sign: str = "") -> str:
    return "" if value is None else interval_text(value, sign)


def _with_error(value: Mapping[str, float | None] | None) -> str:
    error = None if value is None else value["prompt_error"]
    return _interval(value) + ("" if error is None else f" ({decimal(error)})")
