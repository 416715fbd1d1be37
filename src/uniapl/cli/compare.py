"""`uniapl compare`: run the cells of a comparison, and write results.json and compare.html."""

import argparse
import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from uniapl.cli.help import short_parser
from uniapl.cli.train import resolve_arguments
from uniapl.compare import results, verdict
from uniapl.compare.judge import load_judge
from uniapl.compare.plan import BASE, SEARCH_SEED, Cell, Variant, parse_methods
from uniapl.compare.prepare import Prepared, claim, prepare, recorded_threads
from uniapl.compare.runner import Runner, search, search_cells
from uniapl.compare.sampling import sampling_temperature
from uniapl.errors import UsageError
from uniapl.files import write_text
from uniapl.report.comparison import render_comparison
from uniapl.training.checkpoint.disk import exclusive

METHODS = "sft,grpo,sft -> grpo,chord-mu,uniapl"


def compare(arguments: Sequence[str]) -> dict[str, Any]:
    """`uniapl compare`; returns the contents of results.json, or {} with `--dry-run`.

    Raises:
        UsageError: The recipe, a method or an option is invalid; no cell was run.
        UniAPLError: Some cells failed; the others are kept.
    """
    options, rest = _parse(arguments)
    resolved = resolve_arguments("compare", rest)
    variants = parse_methods(options.methods)
    prepared = prepare(resolved, variants, search=options.search)
    # A dry run measures nothing.
    judge = load_judge(options.judge) if options.judge and not options.dry_run else None
    # The width of a pipe is not defined.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    directory = options.output_dir
    threads, notes = _threads(options)
    for note in [*prepared.notes, *notes]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    runner = Runner(
        directory=directory,
        jobs=options.jobs,
        threads=threads,
        cut=prepared.cut,
        base=prepared.base,
        eval_steps=resolved.config.eval_steps,
        keep_models=options.keep_models,
        devices=_devices(),
        console=console,
    )
    if options.dry_run:
        if directory.exists():
            claim(directory, prepared)
        _show_plan(prepared, variants, options, runner)
        return {}
    with exclusive(directory):
        claim(directory, prepared, threads=threads)
        found = search(prepared.plan, variants, runner) if options.search else {}
        cells = _cells(prepared, variants, options.seeds, found)
        # One call runs all cells, so that no process is idle; then the outcomes are read by method.
        runner.run(
            [cell for seed in range(options.seeds) for own in cells.values() for cell in own[seed : seed + 1]]
        )
        runs = {
            label: [results.measure(runner.read(cell), prepared.main, judge) for cell in own]
            for label, own in cells.items()
        }
        summary = _summary(prepared, options, found)
        summary |= results.summarize(runs, variants, main=prepared.main)
        if prepared.main_is_trained:
            summary["verdict"].append(verdict.OF_TRAINED_SCORE)
        write_text(directory / "results.json", json.dumps(summary, indent=1))
        write_text(directory / "compare.html", render_comparison(summary, title=directory.resolve().name))
    _show(summary, directory, console)
    return summary


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the recipe with its flags."""
    parser = short_parser(
        "compare",
        "Train the recipe's model with several methods at equal budget and compare them on the recipe's "
        "evaluation suites, over several seeds. Finished runs are kept in the output directory: the same "
        "command continues an interrupted comparison. Further flags are keys of the recipe: --max-steps 60.",
    )
    add = parser.add_argument
    add("recipe", metavar="RECIPE.yaml", help="data, model, rewards, evaluation suites and steps")
    help_ = "comma-separated methods, pipelines, settings and swept settings: uniapl, sft -> grpo, "
    help_ += f"uniapl[objective.lambda_adv=0], grpo[objective.beta=0|0.1] (default: {METHODS})"
    add("--methods", default=METHODS, help=help_)
    add("--seeds", type=int, default=3, help="number of seeds, from 0 (default: %(default)s)")
    help_ = "first find each method's learning rate and one setting on validation prompts"
    add("--search", action="store_true", help=help_)
    help_ = "sentence-transformers model that measures the similarity to the expert's completions"
    add("--judge", metavar="MODEL", help=help_)
    help_ = "simultaneous runs; with several GPUs each run gets one (default: %(default)s)"
    add("--jobs", type=int, default=1, help=help_)
    add("--threads", type=int, help="threads of each run (default: as begun, or all cores divided by --jobs)")
    help_ = "keep the trained model of each run in models/ of the output directory"
    add("--keep-models", action="store_true", help=help_)
    add("--output-dir", type=Path, default=Path("runs/compare"), help="default: %(default)s")
    help_ = "print the runs, their budget and the time that remains, and run nothing"
    add("--dry-run", action="store_true", help=help_)
    parser.allow_abbrev = False
    options, rest = parser.parse_known_args(arguments)
    if options.seeds < 2:
        raise UsageError(f"--seeds {options.seeds}: one seed has no interval; give at least 2")
    if options.seeds > SEARCH_SEED:
        raise UsageError(f"--seeds must be at most {SEARCH_SEED}: higher seeds are reserved for the search")
    if options.jobs < 1 or (options.threads is not None and options.threads < 1):
        raise UsageError("--jobs and --threads must be at least 1")
    return options, [options.recipe, *rest]


def _threads(options: argparse.Namespace) -> tuple[int, list[str]]:
    """The threads of each run, and notes on those of the runs that are finished, whose numbers differ."""
    before = recorded_threads(options.output_dir)
    threads = options.threads or before or max(1, (os.cpu_count() or 1) // options.jobs)
    if before is None or threads == before:
        return threads, []
    return threads, [
        f"'{options.output_dir}' was begun with {before} threads for each run and continues with {threads}: "
        "the same run gives slightly different numbers with another number of threads, so that methods are "
        f"compared across both. --threads {before} avoids this"
    ]


def _cells(
    prepared: Prepared, variants: Sequence[Variant], seeds: int, found: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[Cell]]:
    """Label -> the cells of the table, one per seed."""
    cells = {BASE: [Cell(method=BASE, seed=seed) for seed in range(seeds)]}
    for variant in variants:
        settings = found.get(variant.label, {})
        cells[variant.label] = [prepared.plan.cell(variant, seed, settings) for seed in range(seeds)]
    return cells


def _summary(prepared: Prepared, options: argparse.Namespace, found: Mapping[str, Any]) -> dict[str, Any]:
    config = prepared.plan.resolved.config
    budget = prepared.plan.budget
    return {
        "recipe": options.recipe,
        "versions": {name: importlib.metadata.version(name) for name in ("uniapl", "torch", "transformers")},
        "budget": {"rollouts": budget.rollouts, "demonstrations": budget.demonstrations},
        "temperature": sampling_temperature(config),
        "judge": options.judge,
        "search": {label: dict(settings) for label, settings in found.items()},
    }


def _devices() -> list[str]:
    """The GPUs that runs are divided over; empty with at most one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    names = visible.split(",") if visible else list(map(str, range(count)))
    return names if count > 1 else []


def _show_plan(
    prepared: Prepared, variants: Sequence[Variant], options: argparse.Namespace, runner: Runner
) -> None:
    """Print the cells of each method, their budget, and an estimate of the remaining time."""
    cells = _cells(prepared, variants, options.seeds, {})
    if options.search:
        # The second and third round depend on the first.
        for variant in variants:
            cells[f"{variant.label} (search)"] = search_cells(prepared.plan, variant)
    walls = {
        label: [runner.read(c)["wall"] for c in own if runner.finished(c)] for label, own in cells.items()
    }
    known = [seconds for label, own in walls.items() if label != BASE for seconds in own]
    table = Table("method", "steps", "rollouts", "demonstrations", "runs", "finished", "seconds per run")
    remaining, unknown = 0.0, 0
    for label, own in cells.items():
        planned = results.planned(own[0].recipe)
        seconds = fmean(walls[label]) if walls[label] else fmean(known) if known and label != BASE else None
        missing = len(own) - len(walls[label])
        remaining += missing * (seconds or 0)
        unknown += missing if seconds is None else 0
        source = "" if walls[label] or seconds is None else " (of other methods)"
        shown = "not known" if seconds is None else f"{seconds:,.0f}{source}"
        counts = [f"{planned[key]:,}" for key in ("steps", "rollouts", "demonstrations")]
        table.add_row(escape(label), *counts, str(len(own)), str(len(walls[label])), shown)
    runner.console.print(table)
    total = sum(map(len, cells.values())) - sum(map(len, walls.values()))
    text = f"{total} runs remain, {runner.jobs} at a time, threads of each: {runner.threads}"
    if remaining:
        text += f"; about {remaining / runner.jobs / 60:,.0f} minutes, estimated from finished runs"
    if unknown:
        text += f"; the time of {unknown} runs is not known, because no run like them is finished"
    if options.search:
        text += "; the search adds up to 4 runs per method, and the table's runs use its settings"
    runner.console.print(text, markup=False, soft_wrap=True)


def _show(summary: Mapping[str, Any], directory: Path, console: Console) -> None:
    header, *rows = verdict.short_table(summary)
    title = f"means over {len(summary['seeds'])} seeds; 95 % intervals: Student's t over paired seeds"
    # Labels such as uniapl[objective.beta=0] are no markup.
    table = Table(*map(escape, header), title=title)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
    for sentence in summary["verdict"]:
        console.print(sentence, markup=False, soft_wrap=True)
    for label, settings in summary["search"].items():
        console.print(f"search: {label}: {settings}", markup=False, soft_wrap=True)
    console.print(f"{directory / 'compare.html'}  {directory / 'results.json'}", markup=False, soft_wrap=True)
