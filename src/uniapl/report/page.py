"""From data to one HTML file that contains its style, its script and its data."""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from uniapl.files import write_text
from uniapl.report import charts, evaluations, summary
from uniapl.report.completions import BUDGET, pack, packed_completions
from uniapl.report.distributions import distributions
from uniapl.report.models import model_charts
from uniapl.report.reading import RunData, read_run
from uniapl.report.verdict import health_of, verdict

SCRIPTS = ("charts.js", "trajectories.js", "browser.js", "page.js")


def write_report(directories: Sequence[Path], output: Path) -> None:
    """Read runs and write their page.

    Raises:
        UsageError: A directory holds no run, or a damaged one.
    """
    write_text(output, render([read_run(directory) for directory in directories]))


def render(runs: Sequence[RunData], *, budget: int = BUDGET) -> str:
    """The page of one run, or of several runs next to each other.

    Args:
        budget: Bytes for the sampled completions; the page holds a sample of them if they need more.
    """
    if len(runs) > 1:
        return fill("runs", title=", ".join(group.label for group in charts.grouped(runs)), **_several(runs))
    return fill("run", title=runs[0].name, **_one(runs[0], budget))


def fill(kind: str, *, title: str, data: dict[str, Any], **values: Any) -> str:
    """The filled template. Values are escaped, and the page's policy allows only its own script.

    Args:
        kind: "run", "runs" or "comparison".
        data: Packed data for the script.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("uniapl.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    here = files("uniapl.report")
    style = (here / "page.css").read_text(encoding="utf-8")
    script = "\n".join((here / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return environment.get_template("page.html").render(
        kind=kind,
        title=title,
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        data=pack(data),
        **values,
    )


def _hash(text: str) -> str:
    """The hash by which a Content-Security-Policy allows a script or a style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _one(run: RunData, budget: int) -> dict[str, Any]:
    found = distributions(run)
    analyses = [*found["charts"], *model_charts(run.models)]
    packed, shown, total = packed_completions(run.completions, budget)
    return {
        "run": run,
        "summary": summary,
        "verdict": verdict(run),
        "warned": summary.health(run),
        "tables": evaluations.tables(run),
        "lengths": found["lengths"],
        "shown": shown,
        "total": total,
        "completions": packed,
        "data": {"themes": charts.curves([run]), "analyses": analyses, "stages": _stage_starts(run)},
    }


def _several(runs: Sequence[RunData]) -> dict[str, Any]:
    names = charts.labels(runs)
    tiles = [
        {tile["label"]: tile["value"] for tile in (*summary.results(run), *summary.tiles(run))}
        for run in runs
    ]
    labels = list(dict.fromkeys(label for found in tiles for label in found))
    return {
        "summary": summary,
        "health_of": health_of,
        "labels": labels,
        "runs": dict(zip(names, runs, strict=True)),
        "rows": [[found.get(label, "") for label in labels] for found in tiles],
        "data": {"themes": charts.curves(runs), "analyses": charts.cost_curves(runs), "stages": []},
    }


def _stage_starts(run: RunData) -> list[dict[str, Any]]:
    """The first step of each stage but the first, as marks for the curves."""
    starts: dict[int, int] = {}
    for record in run.metrics:
        starts.setdefault(record.get("stage") or 0, record["step"])
    labels = dict(enumerate(run.methods))
    return [{"x": step, "label": labels.get(stage, "")} for stage, step in starts.items() if stage > 0]
