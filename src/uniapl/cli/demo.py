"""`uniapl demo`: train on the demo task, starting from the base model that ships with the package."""

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from uniapl.config.resolve import explicit, merge, resolve
from uniapl.demo.measure import Measurement, measure
from uniapl.demo.metrics import METRICS
from uniapl.demo.recipe import MAX_COMPLETION_LENGTH, RECIPE, REWARDS
from uniapl.demo.task import Task, as_row, make_task
from uniapl.errors import UsageError
from uniapl.files import write_text
from uniapl.models.loading import ModelSource, load_model
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


def demo(flags: Sequence[str] = (), *, task: Task | None = None) -> dict[str, Measurement]:
    """Train, then print measurements and texts of the base and of the trained models on held-out prompts.

    With a reward that is not the honest one, grpo is trained too, for comparison. With `--write DIRECTORY`,
    the task is written as files, with a recipe, instead: see :func:`write_task`.

    Returns:
        The measurements of the base and of the trained models, by name.

    Raises:
        UsageError: A flag is not valid, or the directory cannot be written.
    """
    parser = argparse.ArgumentParser(prog="uniapl demo", add_help=False, allow_abbrev=False)
    parser.add_argument("--write", nargs="?", const="")
    parser.add_argument("--reward", nargs="?", default="honest", const="")
    options, flags = parser.parse_known_args(flags)
    reward = options.reward
    if reward not in REWARDS:
        raise UsageError(f"--reward: unknown reward '{reward}': choose one of {', '.join(REWARDS)}")
    if options.write == "":
        raise UsageError("--write needs a directory")
    task = task or make_task()
    if options.write is not None:
        write_task(task, merge(RECIPE, REWARDS[reward]), Path(options.write), flags)
        return {}
    console = Console(highlight=False)
    with as_file(files("uniapl.demo") / "base") as base:
        recipe = merge(merge(RECIPE, REWARDS[reward]), {"model": {"model_name_or_path": str(base)}})
        ours = resolve(recipe, flags)
        runs = [ours]
        if reward != "honest" and ours.config.method != "grpo":
            beside = f"{ours.config.output_dir}-grpo"
            runs.insert(0, resolve(recipe, [*flags, "--method", "grpo", "--output-dir", beside]))
        models = {"base": base}
        for run in runs:
            console.print(f"\ntraining {run.config.method} with the reward '{reward}'", markup=False)
            models[run.config.method] = train_resolved(run, Given(train_dataset=task.rows)).final_dir
        measured = {name: _measured(path, task) for name, path in models.items()}
    title = f"{len(task.held_out)} held-out prompts, one text each"
    table = Table("", *models, "", title=title)
    for name, form, meaning in SHOWN:
        table.add_row(name, *(form.format(getattr(m, name)) for m, _ in measured.values()), meaning)
    console.print(table)
    for index, prompt in enumerate(list(task.held_out)[:5]):
        console.print(f"\n{prompt.text}", markup=False)
        for name, (_, texts) in measured.items():
            console.print(f"  {name + ':':<8} {texts[index]}", markup=False)
    console.print(f"\nmodel, metrics and all sampled texts: {ours.config.output_dir}", markup=False)
    return {name: measurement for name, (measurement, _) in measured.items()}


def write_task(task: Task, recipe: Mapping[str, Any], directory: Path, flags: Sequence[str] = ()) -> None:
    """Write the rows for training, two suites of held-out rows, the base model and recipe.yaml.

    Args:
        flags: Changes to the recipe.

    Raises:
        UsageError: The directory is not empty or cannot be written.
    """
    held_out, combinations = directory / "held_out.jsonl", directory / "held_out_combinations.jsonl"
    changes = {
        "output_dir": str(directory / "run"),
        "model": {"model_name_or_path": str(directory / "base")},
        "data": {"path": str(directory / "train.jsonl")},
        "evaluation": {
            "suites": [str(held_out), str(combinations)],
            "metrics": list(METRICS),
            "max_completion_length": MAX_COMPLETION_LENGTH,
            "temperature": 1.0,
        },
    }
    resolved = resolve(merge(dict(recipe), changes), flags)
    if directory.is_dir() and any(directory.iterdir()):
        raise UsageError(f"--write '{directory}' is not empty: choose another directory")
    rows = {
        directory / "train.jsonl": task.rows,
        held_out: [as_row(*pair) for pair in task.held_out.items()],
        combinations: [as_row(*pair) for pair in task.held_out_combinations.items()],
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path, found in rows.items():
            write_text(path, "".join(f"{json.dumps(row)}\n" for row in found))
        with as_file(files("uniapl.demo") / "base") as base:
            shutil.copytree(base, directory / "base")
        write_text(directory / "recipe.yaml", yaml.safe_dump(explicit(resolved), sort_keys=False))
    except OSError as error:
        raise UsageError(f"--write '{directory}' cannot be written: {error}") from error
    Console(highlight=False).print(f"uniapl compare {directory / 'recipe.yaml'}", markup=False)


def _measured(path: Path, task: Task) -> tuple[Measurement, list[str]]:
    model = load_model(ModelSource(base=str(path)))
    return measure(model, AutoTokenizer.from_pretrained(path), task.held_out)
