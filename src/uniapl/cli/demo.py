"""`uniapl demo`: UniAPL on the demo task, from the model that is part of the package."""

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
    ("passed", "{:.2f}", "satisfies every constraint, which is all that the reward checks"),
    ("fluency", "{:.3f}", "fraction of well-formed, distinct sentences"),
    ("length_distance", "{:.2f}", "distance between the length distributions of model and expert, in words"),
    (
        "place_habit",
        "{:.2f}",
        "mentions a place although the prompt does not ask for one, as the expert does",
    ),
    ("expert_nll", "{:.3f}", "negative log-likelihood of the expert's texts, in nats per token"),
    ("distinct", "{:.2f}", "fraction of distinct texts"),
)


def demo(flags: Sequence[str] = (), *, task: Task | None = None) -> tuple[Measurement, Measurement]:
    """Train, measure the base model and the result on held-out prompts, and print both."""
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
    for prompt, old, new in list(zip(task.held_out, before.texts, after.texts, strict=True))[:5]:
        console.print(f"\n{prompt.text}\n  before: {old}\n  after:  {new}", markup=False)
    console.print(f"\nmodel, metrics and all sampled texts: {result.output_dir}")
    return before, after


def _measured(path: Path, task: Task) -> Measurement:
    model = load_model(ModelSource(base=str(path)))
    return measure(model, AutoTokenizer.from_pretrained(path), task.held_out)
