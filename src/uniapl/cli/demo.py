"""`uniapl demo`: UniAPL on the embedded task, from the model that ships with the package."""

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
    ("good", "{:.2f}", "satisfies every constraint and is fluent throughout"),
    ("passed", "{:.2f}", "satisfies every constraint: all that the reward sees"),
    ("fluency", "{:.3f}", "share of well-formed, distinct sentences"),
    ("length_distance", "{:.2f}", "distance of the lengths from the expert's, in words"),
    ("place_habit", "{:.2f}", "mentions a place unasked: a habit of the expert's"),
    ("expert_nll", "{:.3f}", "nats per token of the expert's texts"),
    ("distinct", "{:.2f}", "share of distinct texts"),
)


def demo(flags: Sequence[str] = (), *, task: Task | None = None) -> tuple[Measurement, Measurement]:
    """Train, measure the base and the result on held-out prompts, and print what changed."""
    task = task or make_task()
    console = Console(highlight=False)
    with as_file(files("uniapl.demo") / "base") as base:
        resolved = resolve(merge(RECIPE, {"model": {"model_name_or_path": str(base)}}), flags)
        result = train_resolved(resolved, train_dataset=task.rows)
        before, after = (_measured(path, task) for path in (base, result.final_dir))
    table = Table("", "base", resolved.config.method, "", title="256 held-out prompts, one text each")
    for name, form, meaning in SHOWN:
        table.add_row(name, form.format(getattr(before, name)), form.format(getattr(after, name)), meaning)
    console.print(table)
    for index, prompt in enumerate(list(task.held_out)[:5]):
        console.print(f"\n{prompt.text}", markup=False)
        console.print(f"  before: {before.texts[index]}", markup=False)
        console.print(f"  after:  {after.texts[index]}", markup=False)
    console.print(f"\nmodel, metrics and every sampled text: {result.output_dir}")
    return before, after


def _measured(path: Path, task: Task) -> Measurement:
    model = load_model(ModelSource(base=str(path)))
    return measure(model, AutoTokenizer.from_pretrained(path), task.held_out)
