"""One cell: train, measure on held-out prompts along the way and at the end, and say what it cost."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from uniapl.compare.plan import SEARCH_SEED, Cell
from uniapl.config import ModelConfig
from uniapl.config.resolve import merge, resolve
from uniapl.demo.measure import Measurement, measure
from uniapl.demo.task import Task, make_task
from uniapl.models.loading import load_model
from uniapl.training.api import train_resolved

EVAL_STEPS = 10
"""Steps between the points of a curve."""
CURVE_PROMPTS = 128
"""Held-out prompts that a point is measured on; the end of a run is measured on all of them."""

WATCHED = ("reward", "entropy", "discriminator/win_rate", "discriminator/accuracy", "discriminator/paused")
"""Metrics of the training step that a curve keeps beside the measurements."""

REFERENCE_ROWS, REFERENCE_STEPS = 4096, 192
"""Expert texts, and steps of 64, that make the reference model of the expert: three passes."""


def run_cell(cell: Cell, reference: Path) -> dict[str, Any]:
    """Train and measure one cell; the method "base" is measured as it is.

    Args:
        reference: The model that :func:`make_reference` wrote.

    Returns:
        The cell, its final measurements, its curve and its cost, as plain values.
    """
    task = task_of(cell)
    expert = load_model(ModelConfig(model_name_or_path=str(reference)))
    with as_file(files("uniapl.demo") / "base") as base, tempfile.TemporaryDirectory() as work:
        tokenizer = AutoTokenizer.from_pretrained(base)
        trained, records = base, []
        if cell.method != "base":
            trained, records = _train(cell, task, base, tokenizer, Path(work))
        model = load_model(ModelConfig(model_name_or_path=str(trained)))
    splits = {"held_out": task.held_out, "held_out_combinations": task.held_out_combinations}
    final = {
        name: _values(measure(model, tokenizer, texts, reference=expert)) for name, texts in splits.items()
    }
    return {"cell": asdict(cell), "final": final, **_costs(records)}


def _train(
    cell: Cell, task: Task, base: Path, tokenizer: PreTrainedTokenizerBase, work: Path
) -> tuple[Path, list[dict[str, Any]]]:
    """The trained model and the metrics of its steps."""
    seen = dict(list(task.held_out.items())[:CURVE_PROMPTS])

    def look(step: int, model: PreTrainedModel) -> Mapping[str, Any]:
        return _values(measure(model, tokenizer, seen)) if step % EVAL_STEPS == 0 else {}

    changes = {
        "output_dir": str(work / "run"),
        "save_steps": 10**6,
        "model": {"model_name_or_path": str(base)},
    }
    result = train_resolved(resolve(merge(cell.recipe, changes)), train_dataset=task.rows, evaluate=look)
    lines = (result.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return result.final_dir, [json.loads(line) for line in lines]


def task_of(cell: Cell) -> Task:
    """The cell's prompts and texts: a draw of its seed's own, and nothing of the search's in a test."""
    demonstrations = int(cell.settings.get("demonstrations", 256))
    without = () if cell.split == "validation" else make_task(seed=SEARCH_SEED).texts
    return make_task(seed=cell.seed, demonstrations=demonstrations, without=without)


def make_reference(path: Path) -> None:
    """A model of the expert: the base, fine-tuned on thousands of its texts, a draw of their own."""
    task = make_task(seed=SEARCH_SEED - 1, prompts=REFERENCE_ROWS, demonstrations=REFERENCE_ROWS, held_out=0)
    with as_file(files("uniapl.demo") / "base") as base, tempfile.TemporaryDirectory() as work:
        recipe = {
            "method": "sft",
            "output_dir": work,
            "max_steps": REFERENCE_STEPS,
            "save_steps": REFERENCE_STEPS,
            "model": {"model_name_or_path": str(base)},
            "optim": {"learning_rate": 1e-3, "lr_scheduler_type": "linear"},
            "batching": {"demonstrations_per_step": 64, "max_tokens_per_micro_batch": 1024},
        }
        result = train_resolved(resolve(recipe), train_dataset=task.rows)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        shutil.copytree(result.final_dir, temporary)
    temporary.rename(path)


def _values(measurement: Measurement) -> dict[str, Any]:
    """All of a measurement but its texts."""
    return {name: value for name, value in asdict(measurement).items() if name != "texts"}


def _costs(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The curve and the whole run's cost; measuring is not counted."""
    cost = {"rollout_tokens": 0, "trained_tokens": 0, "seconds": 0.0}
    curve: list[dict[str, Any]] = []
    for record in records:
        cost["rollout_tokens"] += record["tokens/rollout"]
        cost["trained_tokens"] = record["num_tokens"]
        cost["seconds"] += record["step_time"] - record["time/evaluate"]
        point = {name.removeprefix("eval/"): v for name, v in record.items() if name.startswith("eval/")}
        if point:
            seen = {name: record[name] for name in WATCHED if record.get(name) is not None}
            curve.append({"step": record["step"], **cost, **point, **seen})
    return {"curve": curve, "cost": cost}
