"""The page of a comparison: the results of `uniapl compare` as tables and charts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uniapl.errors import UsageError
from uniapl.files import write_text
from uniapl.report.analysis import interval_text, rounded
from uniapl.report.charts import Chart, line_chart
from uniapl.report.page import fill

RESULTS = "results.json"
SPLITS = {"held_out": "held-out prompts", "held_out_combinations": "held-out combinations"}
DISTANCES = {
    "expert_nll": "nats per token of the expert's texts",
    "length_distance": "distance of lengths from the expert's, words",
}
FRONT_MEASURES = {
    "good_at_equal_closeness": "good at equal closeness",
    "distance_at_equal_good": "distance at equal good",
    "best_good": "best good",
}
ABLATION_MEASURES = ("good", "fluency", "expert nll", "length distance")


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
        page = render_comparison(summary, title=directory.resolve().name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"'{path}' was not written by uniapl compare: {error!r}") from error
    write_text(output, page)


def render_comparison(summary: Mapping[str, Any], *, title: str) -> str:
    """The page, with the parts that were run."""
    themes: list[dict[str, Any]] = []
    if "curves" in summary:
        themes.append({"title": "Quality over cost", "charts": [_curves(summary["curves"])]})
    if summary.get("fronts"):
        fronts = [_front(name, front) for name, front in summary["fronts"].items()]
        themes.append({"title": "Fronts: good and closeness", "charts": fronts})
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    return fill(
        "comparison",
        title=title,
        introduction=(
            f"Results on the demo task, seeds {', '.join(map(str, summary['seeds']))}. Each run samples at "
            f"most {summary['budget']['rollouts']:,} rollouts and trains on "
            f"{summary['budget']['demonstrations']:,} demonstrations (sft: more demonstrations in place of "
            f"the rollouts). Square brackets: 95 % intervals of the mean over seeds, and of differences over "
            f"paired seeds (Student's t). {versions}."
        ),
        tables=list(_tables(summary)),
        chosen=summary["settings"],
        found=summary.get("search", {}),
        data={"themes": themes, "analyses": [], "stages": []},
    )


def _tables(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    tables: list[dict[str, Any]] = []
    if "table" in summary:
        tables.append({"title": "Methods", **_methods(summary["table"])})
    for name, front in (summary.get("fronts") or {}).items():
        tables.append({"title": f"Front, {_front_name(name)}", **_front_table(front)})
    for split, title in SPLITS.items() if "ablations" in summary else ():
        rows = [
            [
                name,
                *(f"{v['mean']:.3f} ({_interval(v['difference'], sign='+')})" for v in row[split].values()),
            ]
            for name, row in summary["ablations"].items()
        ]
        header = ["variant", *(f"{measure}, and difference" for measure in ABLATION_MEASURES)]
        tables.append({"title": f"Variants of uniapl, {title}", "header": header, "rows": rows})
    return tables


def _methods(table: Mapping[str, Any]) -> dict[str, Any]:
    best = table["best_baseline"]
    header = [
        "method", "good", f"minus {best}", "good, held-out combinations", f"minus {best}", "passed",
        "fluency", "expert nll", "length distance", "reference nll", "distinct-2", "rollout tokens",
        "trained tokens", "seconds", *(f"tokens to {level:.2f}" for level in table["levels"]),
    ]  # fmt: skip
    rows: list[list[str]] = []
    for method, row in table["methods"].items():
        here, there, cost = row["held_out"], row["held_out_combinations"], row["cost"]
        differences = {} if method == best else row.get("minus_best_baseline", {})
        measures = ("passed", "fluency", "expert_nll", "length_distance", "reference_nll", "distinct_2")
        rows.append(
            [
                method,
                _interval(here["good"]),
                _interval(differences.get("held_out"), sign="+"),
                _interval(there["good"]),
                _interval(differences.get("held_out_combinations"), sign="+"),
                *(format(here[m]["mean"], ".2f" if m == "length_distance" else ".3f") for m in measures),
                *(f"{cost[name]:,.0f}" for name in ("rollout_tokens", "trained_tokens", "seconds")),
                *(
                    "never" if n is None else f"{n:,.0f}"
                    for n in row.get("rollout_tokens_to_reach", {}).values()
                ),
            ]
        )
    return {"header": header, "rows": rows}


def _front_table(front: Mapping[str, Any]) -> dict[str, Any]:
    header = ["method", *(cell for name in FRONT_MEASURES.values() for cell in (name, "uniapl minus this"))]
    rows: list[list[str]] = []
    for method, row in front["methods"].items():
        ours = row["ours_minus_this"] or {}
        cells = [(_interval(row[m]), _interval(ours.get(m), sign="+")) for m in FRONT_MEASURES]
        rows.append([method, *(text for pair in cells for text in pair)])
    return {"header": header, "rows": rows}


def _curves(curves: Mapping[str, Any]) -> Chart:
    lines = [
        {"label": method, "x": curve["rollout_tokens"], "y": [rounded(value) for value in curve["good"]]}
        for method, curve in curves.items()
        if max(curve["rollout_tokens"]) > 0
    ]
    note = "Means over seeds of good on held-out prompts; methods without rollouts have no line."
    return line_chart("Good over rollout tokens", lines, x="rollout tokens", note=note)


def _front(name: str, front: Mapping[str, Any]) -> Chart:
    lines = [
        {
            "label": method,
            "names": [f"{point['value']:g}" for point in row["points"]],
            **_sides(row["points"], "distance", ("x", "xlow", "xhigh")),
            **_sides(row["points"], "good", ("y", "low", "high")),
        }
        for method, row in front["methods"].items()
    ]
    note = (
        "Points further right are closer to the expert; labels are values of the method's setting, lines at "
        "a point its 95 % intervals over seeds (Student's t)."
    )
    title, x = _front_name(name).capitalize(), DISTANCES[name.split("/")[1]]
    return line_chart(title, lines, kind="points", x=x, note=note) | {"reversed": True}


def _sides(points: Sequence[Mapping[str, Any]], measure: str, names: Sequence[str]) -> dict[str, list[Any]]:
    return {
        name: [rounded(point[measure][side]) for point in points]
        for name, side in zip(names, ("mean", "low", "high"), strict=True)
    }


def _front_name(name: str) -> str:
    split, distance = name.split("/")
    return f"{SPLITS[split]}, {DISTANCES[distance]}"


def _interval(value: Mapping[str, float | None] | None, *, sign: str = "") -> str:
    return "" if value is None else interval_text(value, sign)
