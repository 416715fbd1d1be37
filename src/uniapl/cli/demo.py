"""`uniapl demo`: train on a demo task, starting from its base model, which ships with the package."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from uniapl.config import Config
from uniapl.config.resolve import explicit, merge, resolve
from uniapl.demo import tools
from uniapl.demo.measure import Measurement, measure
from uniapl.demo.measure_tools import measure_tools
from uniapl.demo.metrics import METRICS
from uniapl.demo.options import demo_options
from uniapl.demo.recipe import MAX_COMPLETION_LENGTH, RECIPE, REWARDS, TOOLS_RECIPE
from uniapl.demo.task import Task, as_row, make_task
from uniapl.demo.tools import ToolTask, make_tool_task
from uniapl.errors import UsageError
from uniapl.files import write_text
from uniapl.models.loading import ModelSource, load_model
from uniapl.report import write_report
from uniapl.report.reading import MEASUREMENTS
from uniapl.training.api import train_resolved
from uniapl.training.given import Given

SHOWN = (
    ("good", "{:.2f}", "satisfies every constraint and is fluent"),
    ("passed", "{:.2f}", "satisfies every constraint, which is all that the honest reward measures"),
    ("fluency", "{:.3f}", "fraction of well-formed, distinct sentences"),
    ("length_distance", "{:.2f}", "distance of the lengths from the expert's, in words"),
    ("place_habit", "{:.2f}", "mentions a place that the prompt does not ask for: a habit of the expert"),
    ("expert_nll", "{:.3f}", "nats per token of the expert's texts"),
    ("distinct", "{:.2f}", "fraction of distinct texts"),
)
TOOLS_SHOWN = (
    ("solved", "{:.2f}", "ends with the right answer"),
    ("calls", "{:.2f}", "tool calls per trajectory"),
    ("malformed", "{:.2f}", "ends with a call that cannot be read"),
    ("unanswered", "{:.2f}", "does not end with an answer"),
    ("expert_nll", "{:.3f}", "nats per token of the expert's turns"),
)


@dataclass(frozen=True, kw_only=True)
class _Demo:
    """A demo task as files, and how it is measured."""

    base: str
    """Directory of the base model in `uniapl.demo`."""
    recipe: Mapping[str, Any]
    rows: list[dict[str, Any]]
    suites: Mapping[str, list[dict[str, Any]]]
    """Name -> held-out rows."""
    prompts: list[str]
    """The prompts that are measured."""
    measure: Callable[[Path, Config], tuple[Any, list[str]]]
    """(model, recipe) -> the measurement and the completions."""
    shown: Sequence[tuple[str, str, str]]
    """Field of the measurement, its format and its meaning."""


def demo(flags: Sequence[str] = (), *, task: Task | ToolTask | None = None) -> dict[str, Any]:
    """Train, then print measurements and completions of the base and of the trained models on held-out
    prompts.

    With a reward that is not the honest one, grpo is trained too, for comparison. With `--write DIRECTORY`,
    the task is written as files, with a recipe, instead: see :func:`write_task`.

    Args:
        flags: `--task`, `--reward`, `--write`, and keys of the recipe.
        task: The task in place of the one that `--task` names.

    Returns:
        The measurements of the base and of the trained models, by name.

    Raises:
        UsageError: A flag is not valid, or the directory cannot be written.
    """
    options, flags = demo_options(flags)
    given = task or (make_tool_task() if options.task == "tools" else make_task())
    chosen = _with_tools(given) if isinstance(given, ToolTask) else _with_sentences(given, options.reward)
    if options.write is not None:
        write_task(chosen, Path(options.write), flags)
        return {}
    console = Console(highlight=False)
    with as_file(files("uniapl.demo") / chosen.base) as base:
        recipe = merge(dict(chosen.recipe), {"model": {"model_name_or_path": str(base)}})
        ours = resolve(recipe, flags)
        runs = [ours]
        if options.reward != "honest" and ours.config.method != "grpo":
            beside = f"{ours.config.output_dir}-grpo"
            runs.insert(0, resolve(recipe, [*flags, "--method", "grpo", "--output-dir", beside]))
        models = {"base": base}
        for run in runs:
            console.print(f"\ntraining {run.config.method} with the reward '{options.reward}'", markup=False)
            models[run.config.method] = train_resolved(run, Given(train_dataset=chosen.rows)).final_dir
        measured = {name: chosen.measure(path, ours.config) for name, path in models.items()}
    found = _shown(chosen, {name: measurement for name, (measurement, _) in measured.items()})
    table = Table("", *models, "", title=found["title"])
    for row in found["rows"]:
        table.add_row(row["name"], *row["values"], row["meaning"])
    console.print(table)
    _add_to_reports(found, [Path(run.config.output_dir) for run in runs])
    for index, prompt in enumerate(chosen.prompts[:5]):
        console.print(f"\n{prompt}", markup=False)
        for name, (_, texts) in measured.items():
            console.print(f"  {name + ':':<8} {texts[index]}", markup=False, soft_wrap=True)
    console.print(f"\nmodel, metrics and all sampled texts: {ours.config.output_dir}", markup=False)
    return {name: measurement for name, (measurement, _) in measured.items()}


def _shown(task: _Demo, measured: Mapping[str, Any]) -> dict[str, Any]:
    """The measurements of the models as measurements.json has them."""
    return {
        "title": f"{len(task.prompts)} held-out prompts, one completion each",
        "models": [*measured],
        "rows": [
            {
                "name": name,
                "meaning": meaning,
                "values": [form.format(getattr(m, name)) for m in measured.values()],
            }
            for name, form, meaning in task.shown
        ],
    }


def _add_to_reports(found: Mapping[str, Any], directories: Sequence[Path]) -> None:
    """Write the measurements into the runs, and their reports again."""
    for directory in directories:
        write_text(directory / MEASUREMENTS, json.dumps(found, indent=1))
        write_report([directory], directory / "report.html")


def write_task(task: _Demo, directory: Path, flags: Sequence[str] = ()) -> None:
    """Write the rows for training, the suites of held-out rows, the base model and recipe.yaml.

    Args:
        flags: Changes to the recipe.

    Raises:
        UsageError: The directory is not empty or cannot be written.
    """
    suites = {directory / f"{name}.jsonl": rows for name, rows in task.suites.items()}
    changes = {
        "output_dir": str(directory / "run"),
        "model": {"model_name_or_path": str(directory / "base")},
        "data": {"path": str(directory / "train.jsonl")},
        "evaluation": {"suites": [*map(str, suites)]},
    }
    resolved = resolve(merge(dict(task.recipe), changes), flags)
    if directory.is_dir() and any(directory.iterdir()):
        raise UsageError(f"--write '{directory}' is not empty: choose another directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path, found in {directory / "train.jsonl": task.rows, **suites}.items():
            write_text(path, "".join(f"{json.dumps(row)}\n" for row in found))
        with as_file(files("uniapl.demo") / task.base) as base:
            shutil.copytree(base, directory / "base")
        write_text(directory / "recipe.yaml", yaml.safe_dump(explicit(resolved), sort_keys=False))
    except OSError as error:
        raise UsageError(f"--write '{directory}' cannot be written: {error}") from error
    Console(highlight=False).print(f"uniapl compare {directory / 'recipe.yaml'}", markup=False)


def _with_sentences(task: Task, reward: str) -> _Demo:
    def measured(path: Path, config: Config) -> tuple[Measurement, list[str]]:
        model = load_model(ModelSource(base=str(path)))
        return measure(model, AutoTokenizer.from_pretrained(path), task.held_out)

    evaluation = {
        "metrics": list(METRICS),
        "max_completion_length": MAX_COMPLETION_LENGTH,
        "temperature": 1.0,
    }
    splits = {"held_out": task.held_out, "held_out_combinations": task.held_out_combinations}
    return _Demo(
        base="base",
        recipe=merge(merge(RECIPE, REWARDS[reward]), {"evaluation": evaluation}),
        rows=task.rows,
        suites={name: [as_row(*pair) for pair in split.items()] for name, split in splits.items()},
        prompts=[prompt.text for prompt in task.held_out],
        measure=measured,
        shown=SHOWN,
    )


def _with_tools(task: ToolTask) -> _Demo:
    splits = {"held_out": task.held_out, "held_out_people": task.held_out_people}
    return _Demo(
        base="base-tools",
        recipe=TOOLS_RECIPE,
        rows=task.rows,
        suites={name: [tools.as_row(one, solved=True) for one in split] for name, split in splits.items()},
        prompts=[question.text for question in task.held_out],
        measure=lambda path, config: measure_tools(path, config, task),
        shown=TOOLS_SHOWN,
    )
