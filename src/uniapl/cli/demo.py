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
from uniapl.demo.rewards import REWARDS
from uniapl.demo.task import Task, make_task
from uniapl.errors import UsageError
from uniapl.models.loading import ModelSource, load_model
from uniapl.training.api import train_resolved

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

    With a reward that is not the honest one, grpo is trained too, for comparison.

    Returns:
        The measurements of the base and of the trained models, by name.

    Raises:
        UsageError: A flag is not valid.
    """
    reward, flags = _reward(flags)
    task = task or make_task()
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
            models[run.config.method] = train_resolved(run, train_dataset=task.rows).final_dir
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


def _reward(flags: Sequence[str]) -> tuple[str, list[str]]:
    """The value of `--reward`, and the other flags."""
    rest, reward = list(flags), "honest"
    for index, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        if name == "--reward":
            end = index + 1 if equals else index + 2
            reward = value if equals else "".join(flags[index + 1 : end])
            rest = [*flags[:index], *flags[end:]]
    if reward not in REWARDS:
        raise UsageError(f"--reward: unknown reward '{reward}': choose one of {', '.join(REWARDS)}")
    return reward, rest


def _measured(path: Path, task: Task) -> tuple[Measurement, list[str]]:
    model = load_model(ModelSource(base=str(path)))
    return measure(model, AutoTokenizer.from_pretrained(path), task.held_out)
