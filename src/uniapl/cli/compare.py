"""`uniapl compare`: run the cells of a comparison, and write results.json and compare.html."""

import argparse
import importlib.metadata
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from uniapl.compare import plan, results
from uniapl.compare.plan import PIPELINES, SEARCH_SEED, Cell
from uniapl.compare.runner import run_cells, search
from uniapl.demo.rewards import REWARDS
from uniapl.errors import UsageError
from uniapl.files import write_text
from uniapl.report.comparison import render_comparison

PARTS = ("search", "table", "fronts", "ablations")


def compare(arguments: Sequence[str]) -> dict[str, Any]:
    """`uniapl compare`: the contents of results.json.

    Raises:
        UsageError: An unknown method or part.
        UniAPLError: Some cells failed.
    """
    options = _parse(arguments)
    directory, methods, seeds, jobs = options.output_dir, options.methods, options.seeds, options.jobs
    reward: str = options.reward
    summary: dict[str, Any] = {
        "versions": {name: importlib.metadata.version(name) for name in ("uniapl", "torch", "transformers")},
        "seeds": list(range(seeds)),
        "budget": {"rollouts": plan.ROLLOUTS, "demonstrations": plan.DEMONSTRATIONS},
        "reward": reward,
        "settings": {method: plan.settings_of(method, reward) for method in methods},
    }

    def run(cells: Sequence[Cell]) -> list[results.Outcome]:
        return run_cells(cells, directory, jobs=jobs)

    if "search" in options.parts:
        summary["search"] = search(methods, directory, jobs=jobs, reward=reward)
    base = run([Cell(method="base", settings={}, seed=seed) for seed in range(seeds)])
    # One call runs all cells of a part, so that no process is idle; then the outcomes are read by method.
    if "table" in options.parts:
        run(plan.table_cells(methods, seeds, reward=reward))
        by_method = {"base": base} | {m: run(plan.table_cells([m], seeds, reward=reward)) for m in methods}
        summary["table"] = results.table(by_method)
        summary["curves"] = {m: results.mean_curve(by_method[m], base) for m in methods}
    if "fronts" in options.parts:
        swept = {m: [plan.front_of(m, seed) for seed in range(seeds)] for m in methods if m in plan.FRONTS}
        run([cell for seed in range(seeds) for fronts in swept.values() for cell in fronts[seed]])
        outcomes = {m: [run(cells) for cells in fronts] for m, fronts in swept.items()}
        summary["fronts"] = results.fronts(outcomes, base) if outcomes else {}
    if "ablations" in options.parts:
        variants = plan.ablation_cells(seeds, reward=reward)
        run([cell for cells in variants.values() for cell in cells])
        uniapl = run(plan.table_cells(["uniapl"], seeds, reward=reward))
        summary["ablations"] = results.ablations({n: run(cells) for n, cells in variants.items()}, uniapl)
    write_text(directory / "results.json", json.dumps(summary, indent=1))
    write_text(directory / "compare.html", render_comparison(summary, title=directory.resolve().name))
    _show(summary, directory)
    return summary


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="uniapl compare",
        description="Compare methods on the demo task, at equal budget. Finished cells are files in the "
        "output directory, so the same command continues an interrupted comparison.",
    )
    add = parser.add_argument
    add("--output-dir", type=Path, default=Path("runs/compare"), help="default: %(default)s")
    help_ = f"comma-separated methods (default: all of {', '.join(PIPELINES)})"
    add("--methods", type=_list_of(tuple(PIPELINES), "method"), default=list(PIPELINES), help=help_)
    add("--seeds", type=int, default=5, help="number of seeds, from 0 (default: %(default)s)")
    add("--reward", choices=REWARDS, default="honest", help="reward of the demo task (default: %(default)s)")
    help_ = "simultaneous processes (default: %(default)s)"
    add("--jobs", type=int, default=os.cpu_count() or 1, help=help_)
    help_ = f"comma-separated parts of {', '.join(PARTS)} (default: table)"
    add("--parts", type=_list_of(PARTS, "part"), default=["table"], help=help_)
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.jobs < 1:
        raise UsageError("--seeds and --jobs must be at least 1")
    if options.seeds >= SEARCH_SEED:
        raise UsageError(f"--seeds must be below {SEARCH_SEED}: higher seeds are reserved for the search")
    return options


def _list_of(known: Sequence[str], name: str) -> Any:
    def parse(text: str) -> list[str]:
        items = [item.strip() for item in text.split(",")]
        for item in items:
            if item not in known:
                raise UsageError(f"unknown {name} '{item}': choose from {', '.join(known)}")
        return items

    return parse


def _show(summary: dict[str, Any], directory: Path) -> None:
    console = Console(highlight=False)
    if "table" in summary:
        header, *rows = results.short_table(summary["table"])
        shown = Table(
            *header,
            title=f"means over {len(summary['seeds'])} seeds; 95 % intervals: Student's t over paired seeds",
        )
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
    for method, settings in summary.get("search", {}).items():
        console.print(f"search: {method}: {settings}", markup=False)
    console.print(f"{directory / 'compare.html'}  {directory / 'results.json'}", markup=False)
