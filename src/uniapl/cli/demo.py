"""`uniapl demo`: train on the demo task, starting from the base model that ships with the package."""

from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from uniapl.config.resolve import merge, resolve
from uniapl.demo.measure import Measurement, measure
from uniapl.demo.recipe import RECIPE
from uniapl.demo.task import Task, make_task
from uniapl.models.loading import ModelSource, load_model
from uniapl.training.api import train_resolved

SHOWN = (
    ("good", "{:.2f}", "satisfies every constraint and is fluent"),
    ("passed", "{:.2f}", "satisfies every constraint, which is all that the reward measures"),
    ("fluency", "{:.3f}", "fraction of well-formed, distinct sentences"),
    ("length_distance", "{:.2f}", "distance of the lengths from the expert's, in words"),
    ("place_habit", "{:.2f}", "mentions a place that the prompt does not ask for: a habit of the expert"),
    ("expert_nll", "{:.3f}", "nats per token of the expert's texts"),
    ("distinct", "{:.2f}", "fraction of distinct texts"),
)


def demo(flags: Sequence[str] = (), *, task: Task | None = None) -> tuple[Measurement, Measurement]:
    """Train, then print measurements and texts of the base and of the trained model on held-out prompts."""
    task = task or make_task()
    console = Console(highlight=False)
    with as_file(files("uniapl.demo") / "base") as base:
        resolved = resolve(merge(RECIPE, {"model": {"model_name_or_path": str(base)}}), flags)
        result = train_resolved(resolved, train_dataset=task.rows)
        (before, old), (after, new) = (_measured(path, task) for path in (base, result.final_dir))
    title = f"{len(task.held_out)} held-out prompts, one text each"
    table = Table("", "base", resolved.config.method, "", title=title)
    for name, form, meaning in SHOWN:
        table.add_row(name, form.format(getattr(before, name)), form.format(getattr(after, name)), meaning)
    console.print(table)
    for prompt, *texts in list(zip(task.held_out, old, new, strict=True))[:5]:
        console.print(f"\n{prompt.text}\n  before: {texts[0]}\n  after:  {texts[1]}", markup=False)
    console.print(f"\nmodel, metrics and all sampled texts: {result.output_dir}", markup=False)
    return before, after


def _measured(path: Path, task: Task) -> tuple[Measurement, list[str]]:
    model = load_model(ModelSource(base=str(path)))
    return measure(model, AutoTokenizer.from_pretrained(path), task.held_out)
