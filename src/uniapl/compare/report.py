"""compare.html: one file with the tables and figures of a comparison; it needs no network."""

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#6e7781"
"""Of everything in a figure that is not data; becomes the page's own text colour."""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>uniapl compare</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }}
th, td {{ padding: 0.25rem 0.7rem; text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
tr + tr {{ border-top: 1px solid #8884; }}
svg {{ max-width: 100%; height: auto; }}
small {{ opacity: 0.75; }}
</style>
<h1>uniapl compare</h1>
{body}
</html>
"""

SPLIT_NAMES = {"held_out": "held-out prompts", "held_out_combinations": "held-out combinations"}
DISTANCE_NAMES = {
    "expert_nll": "nats per token of the expert's texts",
    "length_distance": "distance of lengths from the expert's, words",
}


def render(summary: Mapping[str, Any]) -> str:
    """The page for what `uniapl.compare.command.compare` returns; parts that were not run are left out."""
    parts = [_introduction(summary)]
    if "table" in summary:
        parts += ["<h2>Methods</h2>", _methods(summary["table"])]
        parts += ["<h2>Quality against cost</h2>", _svg(_curves(summary["curves"]))]
    if "fronts" in summary:
        parts += ["<h2>Fronts: good against closeness</h2>", _fronts(summary["fronts"])]
    if "ablations" in summary:
        parts += ["<h2>Variants of uniapl</h2>", _ablations(summary["ablations"])]
    parts += ["<h2>Settings</h2>", _settings(summary)]
    return PAGE.format(body="\n".join(parts))


def _introduction(summary: Mapping[str, Any]) -> str:
    budget, versions = summary["budget"], summary["versions"]
    return (
        f"<p>The embedded task, seeds {', '.join(map(str, summary['seeds']))}; every run samples at most "
        f"{budget['rollouts']:,} rollouts and learns from {budget['demonstrations']:,} demonstrations "
        "(sft: as many more as the others have rollouts). Square brackets: 95 % bootstrap intervals over "
        f"seeds.</p><p><small>{html.escape(', '.join(f'{k} {v}' for k, v in versions.items()))}</small></p>"
    )


def _methods(table: Mapping[str, Any]) -> str:
    best = table["best_baseline"]
    header = [
        "", "good", f"minus {best}", "good, new combinations", f"minus {best}", "passed", "fluency",
        "expert nll", "length distance", "reference nll", "distinct-2", "rollout tokens", "trained tokens",
        "seconds", *(f"tokens to {level:.2f}" for level in table["levels"]),
    ]  # fmt: skip
    rows: list[list[str]] = []
    for method, row in table["methods"].items():
        here, there, cost = row["held_out"], row["held_out_combinations"], row["cost"]
        differences = row.get("minus_best_baseline", {})
        reached = row.get("rollout_tokens_to_reach", {}).values()
        rows.append(
            [
                method,
                _interval(here["good"]),
                _interval(differences.get("held_out"), sign="+"),
                _interval(there["good"]),
                _interval(differences.get("held_out_combinations"), sign="+"),
                *(f"{here[name]['mean']:.3f}" for name in ("passed", "fluency", "expert_nll")),
                f"{here['length_distance']['mean']:.2f}",
                *(f"{here[name]['mean']:.3f}" for name in ("reference_nll", "distinct_2")),
                *(f"{cost[name]:,.0f}" for name in ("rollout_tokens", "trained_tokens", "seconds")),
                *("never" if tokens is None else f"{tokens:,.0f}" for tokens in reached),
            ]
        )
    return _table(header, rows)


def _fronts(fronts: Mapping[str, Any]) -> str:
    parts: list[str] = []
    for name, front in fronts.items():
        split, distance = name.split("/")
        title = f"{SPLIT_NAMES[split]}, {DISTANCE_NAMES[distance]}"
        header = [
            "", "good at equal closeness", "uniapl minus this", "distance at equal good",
            "uniapl minus this", "best good", "uniapl minus this",
        ]  # fmt: skip
        rows: list[list[str]] = []
        for method, row in front["methods"].items():
            ours = row["ours_minus_this"] or {}
            cells = [method]
            for measure in ("good_at_equal_closeness", "distance_at_equal_good", "best_good"):
                cells += [_interval(row[measure]), _interval(ours.get(measure), sign="+")]
            rows.append(cells)
        parts += [f"<h3>{title}</h3>", _svg(_front_figure(front, distance)), _table(header, rows)]
    return "\n".join(parts)


def _ablations(variants: Mapping[str, Any]) -> str:
    header = [
        "",
        *(f"{measure}, and change" for measure in ("good", "fluency", "expert nll", "length distance")),
    ]
    parts: list[str] = []
    for split, title in SPLIT_NAMES.items():
        rows = [[name, *map(_changed, row[split].values())] for name, row in variants.items()]
        parts += [f"<h3>{title}</h3>", _table(header, rows)]
    return "\n".join(parts)


def _settings(summary: Mapping[str, Any]) -> str:
    def said(settings: Mapping[str, Any]) -> str:
        return ", ".join(f"{key} = {value}" for key, value in settings.items())

    rows = [[method, said(settings)] for method, settings in summary["settings"].items()]
    text = _table(["", "used"], rows)
    if "search" in summary:
        found = [[method, said(settings)] for method, settings in summary["search"].items()]
        text += "<h3>Found by the search on validation prompts</h3>" + _table(["", "found"], found)
    return text


def _curves(curves: Mapping[str, Any]) -> Figure:
    figure, axes = _figure("rollout tokens", "good on held-out prompts")
    for number, (method, curve) in enumerate(curves.items()):
        color, line = f"C{number % 10}", "-" if number < 10 else "--"
        if max(curve["rollout_tokens"]) > 0:
            axes.plot(curve["rollout_tokens"], curve["good"], label=method, color=color, linestyle=line)
        else:
            axes.axhline(curve["good"][-1], label=f"{method}, no rollouts", color=color, linestyle=":")
    return _legend(figure, axes)


def _front_figure(front: Mapping[str, Any], distance: str) -> Figure:
    figure, axes = _figure(DISTANCE_NAMES[distance], "good")
    for number, (method, row) in enumerate(front["methods"].items()):
        points = row["points"]
        x, y = ([point[name]["mean"] for point in points] for name in ("distance", "good"))
        errors = [
            [[p[name]["mean"] - p[name]["low"], p[name]["high"] - p[name]["mean"]] for p in points]
            for name in ("distance", "good")
        ]
        horizontal, vertical = ([list(side) for side in zip(*error, strict=True)] for error in errors)
        axes.errorbar(
            x, y, xerr=horizontal, yerr=vertical, marker="o", color=f"C{number}", label=method, capsize=2
        )
        for point, a, b in zip(points, x, y, strict=True):
            axes.annotate(f" {point['value']:g}", (a, b), fontsize=8, color=INK)
    axes.invert_xaxis()
    axes.set_xlabel(f"{DISTANCE_NAMES[distance]} (closer to the right)")
    return _legend(figure, axes)


def _figure(x: str, y: str) -> tuple[Figure, Axes]:
    style = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    )
    with plt.rc_context({**style, "svg.hashsalt": "uniapl", "font.family": "sans-serif"}):
        figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(figure: Figure, axes: Axes) -> Figure:
    axes.legend(frameon=False, labelcolor=INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _svg(figure: Figure) -> str:
    """The figure as an element of the page, in the page's text colour."""
    file = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "uniapl"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = file.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def _interval(value: Mapping[str, float] | None, *, sign: str = "") -> str:
    if value is None:
        return ""
    mean, low, high = (format(value[name], f"{sign}.3f") for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _changed(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:.3f} ({_interval(value['difference'], sign='+')})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    return f'<div class="wide"><table>\n{row(header, "th")}\n{body}\n</table></div>'
