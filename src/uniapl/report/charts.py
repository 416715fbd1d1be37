"""The charts of a report, as descriptions with their data that the page and the figures draw.

{"kind": "lines" | "stack", "title", "x": label of the axis, "log": whether a log scale is offered,
 "smooth": whether smoothing applies, "note", "lines": [{"label", "x", "y", "low"?, "high"?}, ...]}
{"kind": "histogram", "title", "x", "edges", "groups": [{"label", "fractions"}], "note"}
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import takewhile
from typing import Any

import yaml

from uniapl.intervals import student_interval
from uniapl.report.analysis import bin_edges, histogram, mean, rounded
from uniapl.report.reading import RunData, step_phases

Chart = dict[str, Any]

MAX_POINTS = 2000
"""Points of a line: more cannot be distinguished on a screen, and would make the page slow."""
BINS = 24
BANDS = "Bands: 95 % intervals over the seeds of a recipe (Student's t)."


@dataclass(frozen=True)
class Plan:
    """A chart over steps, without data."""

    title: str
    series: Mapping[str, str]
    """The label of each metric's line."""
    log: bool = False
    smooth: bool = True
    """False for settings, which may jump and have no noise."""
    note: str = ""
    spread: str | None = None
    """The metric drawn as a band, plus and minus, around the only line."""
    kind: str = "lines"
    zeros: bool = False
    """Whether to draw lines that are always 0; elsewhere they belong to a component that is switched off."""


@dataclass(frozen=True)
class Group:
    """One run, or runs of one recipe with different seeds."""

    label: str
    runs: list[RunData]


RATES = ("/error_rate", "/timeout_rate", "/none_rate")


def themes(runs: Sequence[RunData]) -> dict[str, list[Plan]]:
    """The charts that the runs may have, by theme: those of charts.yaml, and those of the runs' metrics."""
    text = (files("uniapl.report") / "charts.yaml").read_text(encoding="utf-8")
    plans = {theme: [Plan(**plan) for plan in found] for theme, found in yaml.safe_load(text).items()}
    evaluations = {key: None for run in runs for key in run.keys("eval/")}
    rewards = {key: None for run in runs for key in run.keys("rewards/")}
    functions = {key: function_name(key) for key in rewards if key.endswith("/mean")}
    failures = {
        key: f"{function_name(key)}, {key.rsplit('/', 1)[1].removesuffix('_rate')}"
        for key in (*rewards, *evaluations)
        if key.endswith(RATES) and any(value for run in runs for value in run.series(key))
    }
    if len(functions) > 1:
        plans["Reward"].insert(1, Plan("Reward functions", functions, zeros=True))
    plans["Reward"].append(Plan("Completions without a reward", failures))
    phases = {key: phase for run in runs for key, phase in step_phases(run).items()}
    plans["Cost"].append(Plan("Seconds per step, by phase", phases, kind="stack"))
    scores = [Plan(key.removeprefix("eval/"), {key: "score"}, zeros=True) for key in evaluations]
    return {"Reward": plans.pop("Reward"), "Evaluation": scores, **plans}


def function_name(key: str) -> str:
    """The name of a reward function by its metric: "length" for rewards/path/to/task.py:length/mean."""
    return key.rsplit("/", 1)[0].rsplit(":", 1)[-1].rsplit("/", 1)[-1]


def curves(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """The charts over steps by theme: a line for each metric, or for each recipe if there are several."""
    groups = grouped(runs)
    result: list[dict[str, Any]] = []
    for title, plans in themes(runs).items():
        charts = [
            chart
            for plan in plans
            for chart in (_of_one(plan, groups[0]) if len(groups) == 1 else _of_several(plan, groups))
            if chart["lines"]
        ]
        if charts:
            result.append({"title": title, "charts": charts})
    return result


def cost_curves(runs: Sequence[RunData]) -> list[Chart]:
    """Reward over trained tokens and over time, in which runs differ; for one run, steps show the same."""
    charts: list[Chart] = []
    for key, label in {"num_tokens": "tokens, prompts included", "seconds": "seconds"}.items():
        lines = [line(group, "reward", group.label, x=key) for group in grouped(runs)]
        if known := [found for found in lines if found is not None]:
            charts.append(line_chart(f"Reward over {label}", known, x=label, smooth=True))
    return charts


def grouped(runs: Sequence[RunData]) -> list[Group]:
    """The runs grouped by configuration without seed and output directory, in the given order."""
    members: dict[str, list[tuple[str, RunData]]] = {}
    for label, run in zip(labels(runs), runs, strict=True):
        recipe = repr({k: v for k, v in run.config.items() if k not in ("seed", "output_dir")})
        members.setdefault(recipe, []).append((label, run))
    return [
        Group(_common([label for label, _ in group]), [run for _, run in group]) for group in members.values()
    ]


def labels(runs: Sequence[RunData]) -> list[str]:
    """The directories' names; their paths below the common directory if names are equal."""
    paths = [run.directory.resolve() for run in runs]
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    shared = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(shared).as_posix() for path in paths]


def line(group: Group, key: str, label: str, *, x: str = "step", spread: str | None = None) -> Chart | None:
    """A metric of a run, or its mean over the runs of a group; None if it has no value.

    The band is `spread` for one run and Student's 95 % interval over the runs of a group; a step that only
    one of them has reached has none.
    """
    columns: dict[int, list[tuple[float, float, float | None]]] = {}
    for run in group.runs:
        spreads = run.series(spread) if spread else [None] * len(run.metrics)
        for step, place, value, width in zip(run.steps, run.series(x), run.series(key), spreads, strict=True):
            if place is not None and value is not None:
                columns.setdefault(step, []).append((float(place), float(value), width))
    points: list[tuple[float | None, ...]] = []
    for step in sorted(columns):
        places, values, widths = zip(*columns[step], strict=True)
        centre, low, high = student_interval(values).values()
        if len(group.runs) == 1 and widths[0] is not None:
            low, high = values[0] - widths[0], values[0] + widths[0]
        points.append((mean(places), centre, low, high))
    if not points:
        return None
    size = -(-len(points) // MAX_POINTS)
    parts = (points[start : start + size] for start in range(0, len(points), size))
    xs, ys, lows, highs = zip(
        *([mean(column) for column in zip(*part, strict=True)] for part in parts), strict=True
    )
    found = {"label": label, "x": [_integral(x) for x in xs], "y": [rounded(y) for y in ys]}
    if any(low is not None for low in lows):
        found |= {"low": [rounded(low) for low in lows], "high": [rounded(high) for high in highs]}
    return found


def line_chart(
    title: str,
    lines: Sequence[Chart],
    *,
    x: str = "step",
    kind: str = "lines",
    log: bool = False,
    smooth: bool = False,
    note: str = "",
) -> Chart:
    """The description of a chart with lines; it offers a log scale only if all values are positive."""
    log = log and all(value > 0 for found in lines for value in found["y"])
    return {"kind": kind, "title": title, "x": x, "lines": lines, "log": log, "smooth": smooth, "note": note}


def histogram_chart(title: str, x: str, samples: Mapping[str, Sequence[float]], note: str = "") -> Chart:
    """The description of a histogram of several samples, by their labels."""
    edges = bin_edges(samples.values(), BINS)
    groups = [
        {"label": label, "fractions": [rounded(fraction) for fraction in histogram(values, edges)]}
        for label, values in samples.items()
    ]
    edges = [rounded(edge) for edge in edges]
    return {"kind": "histogram", "title": title, "x": x, "edges": edges, "groups": groups, "note": note}


def _of_one(plan: Plan, group: Group) -> Iterator[Chart]:
    seeds = len(group.runs)
    lines = [
        line(group, key, label, spread=plan.spread if seeds == 1 else None)
        for key, label in plan.series.items()
    ]
    kept = plan.zeros or len(plan.series) == 1
    known = [found for found in lines if found is not None and (kept or any(found["y"]))]
    if plan.kind == "stack":
        known = _aligned(known)
    note = plan.note if seeds == 1 or not plan.spread else ""
    if seeds > 1:
        note = f"{note} Mean of {seeds} seeds with its 95 % interval (Student's t).".strip()
    yield line_chart(plan.title, known, kind=plan.kind, log=plan.log, smooth=plan.smooth, note=note)


def _aligned(lines: list[Chart]) -> list[Chart]:
    """Lines over the same steps; a phase that a step did not have took 0 seconds."""
    places = sorted({x for found in lines for x in found["x"]})
    values = [dict(zip(found["x"], found["y"], strict=True)) for found in lines]
    return [
        {"label": found["label"], "x": places, "y": [known.get(x, 0) for x in places]}
        for found, known in zip(lines, values, strict=True)
    ]


def _of_several(plan: Plan, groups: Sequence[Group]) -> Iterator[Chart]:
    if plan.kind == "stack":
        plan = Plan("Seconds per step", {"step_time": "all phases"})
    for key, label in plan.series.items():
        known = [found for group in groups if (found := line(group, key, group.label)) is not None]
        if known and (plan.zeros or any(value for found in known for value in found["y"])):
            title = plan.title if len(plan.series) == 1 else f"{plan.title}: {label}"
            note = BANDS if any("low" in found for found in known) else ""
            yield line_chart(title, known, log=plan.log, smooth=plan.smooth, note=note)


def _common(labels: Sequence[str]) -> str:
    """The common beginning of the labels of a group."""
    if len(labels) == 1:
        return labels[0]
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*labels, strict=False))
    shared = "".join(letters[0] for letters in alike).rstrip("-_./ 0123456789").removesuffix("seed")
    return f"{shared.rstrip('-_./ ') or labels[0]} ({len(labels)} seeds)"


def _integral(value: float) -> float | int | None:
    return int(value) if value.is_integer() else rounded(value)
