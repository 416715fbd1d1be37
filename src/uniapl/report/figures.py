"""The charts as PNG and SVG files, drawn with matplotlib."""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from uniapl.errors import UsageError
from uniapl.report.analysis import smoothed
from uniapl.report.charts import Chart, cost_curves, curves
from uniapl.report.distributions import distributions
from uniapl.report.models import model_charts
from uniapl.report.reading import RunData

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING = 0.05
"""Window of the moving average, as a fraction of a line; that of page.html."""
# The colors of page.css on a light background.
COLORS = ("#0a62ab", "#c24e00", "#00805c", "#a3478a", "#8a6500", "#2b8cc4", "#4a4f55", "#7a3fb0")
STYLES = ("-", "--", ":", "-.", (0, (8, 3)))


def write_figures(runs: Sequence[RunData], directory: Path) -> list[Path]:
    """Draw every chart of a report; the paths of the files.

    Raises:
        UsageError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--figures needs matplotlib: pip install 'uniapl[report]'")
    from matplotlib.figure import Figure

    charts = [chart for theme in curves(runs) for chart in theme["charts"]]
    if len(runs) == 1:
        charts += [*distributions(runs[0])["charts"], *model_charts(runs[0].models)]
    else:
        charts += cost_curves(runs)
    directory.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for chart in charts:
        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        _draw(figure.subplots(), chart)
        for suffix in (".png", ".svg"):
            name = re.sub(r"\W+", "-", chart["title"].lower()).strip("-")
            path = directory / (name + suffix)
            figure.savefig(path, dpi=160, metadata={"Date": None} if suffix == ".svg" else None)
            written.append(path)
    return written


def _draw(axes: "Axes", chart: Chart) -> None:
    {"lines": _lines, "stack": _stack, "histogram": _histogram}[chart["kind"]](axes, chart)
    axes.set_title(chart["title"], fontsize=11, loc="left")
    axes.set_xlabel(chart["x"])
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        axes.legend(handles, labels, frameon=False, fontsize=8)


def _style(index: int) -> dict[str, Any]:
    return {"color": COLORS[index % len(COLORS)], "linestyle": STYLES[index % len(STYLES)]}


def _lines(axes: "Axes", chart: Chart) -> None:
    for index, line in enumerate(chart["lines"]):
        style = _style(index)
        if chart["smooth"]:
            axes.plot(line["x"], line["y"], color=style["color"], alpha=0.25, linewidth=0.8)
        values: Any = smoothed(line["y"], SMOOTHING if chart["smooth"] else 0.0)
        marker = "o" if len(line["x"]) == 1 else None
        axes.plot(line["x"], values, **style, label=line["label"], marker=marker)
        if "low" in line:
            # NumPy turns None, for a step without an interval, into NaN, which is not drawn.
            low, high = (np.array(line[side], dtype=float) for side in ("low", "high"))
            axes.fill_between(line["x"], low, high, color=style["color"], alpha=0.12, linewidth=0)


def _stack(axes: "Axes", chart: Chart) -> None:
    lines = chart["lines"]
    colors = [_style(index)["color"] for index in range(len(lines))]
    heights, labels = [line["y"] for line in lines], [line["label"] for line in lines]
    axes.stackplot(lines[0]["x"], heights, labels=labels, colors=colors, alpha=0.75)


def _histogram(axes: "Axes", chart: Chart) -> None:
    for index, group in enumerate(chart["groups"]):
        style = _style(index)
        axes.stairs(group["fractions"], chart["edges"], color=style["color"], fill=True, alpha=0.12)
        axes.stairs(group["fractions"], chart["edges"], **style, label=group["label"])
    axes.set_ylabel("fraction of completions")
