"""Run one cell: train, measure on held-out prompts during and after training, and count the costs."""

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
from uniapl.config.resolve import merge, resolve
from uniapl.demo.measure import measure
from uniapl.demo.task import Task, make_task
from uniapl.files import sync, sync_tree
from uniapl.models.loading import ModelSource, load_model
from uniapl.training.api import train_resolved

EVAL_STEPS = 10
"""Steps between the points of a curve."""
HELD_OUT = 1024
"""Held-out prompts, and as many with new combinations, one text each."""
CURVE_PROMPTS = 128
"""Held-out prompts for each point of a curve; the final model is measured on all of them."""
CURVE_METRICS = (
    "reward",
    "trained/entropy",
    "discriminator/win_rate",
    "adversary/active",
    "adversary/reward_change",
    "adversary/advantage_change",
)
"""Metrics of the training step that a point of a curve keeps."""
REFERENCE_ROWS, REFERENCE_STEPS = 4096, 192
"""Expert texts, and steps with 64 of them, to train the reference model of the expert: three epochs."""


def run_cell(cell: Cell, reference: Path) -> dict[str, Any]:
    """Train and measure a cell; the method "base" is measured without training.

    Args:
        reference: The model written by :func:`make_reference`.

    Returns:
        The cell, its final measurements, its curve and its costs, as values for JSON.
    """
    task = task_of(cell)
    expert = load_model(ModelSource(base=str(reference)))
    with as_file(files("uniapl.demo") / "base") as base, tempfile.TemporaryDirectory() as work:
        tokenizer = AutoTokenizer.from_pretrained(base)
        trained, records = base, []
        if cell.method != "base":
            trained, records = _train(cell, task, base, tokenizer, Path(work))
        model = load_model(ModelSource(base=str(trained)))
    splits = {"held_out": task.held_out, "held_out_combinations": task.held_out_combinations}
    final = {
        name: asdict(measure(model, tokenizer, texts, reference=expert)[0]) for name, texts in splits.items()
    }
    return {"cell": asdict(cell), "final": final, **_costs(records)}


def _train(
    cell: Cell, task: Task, base: Path, tokenizer: PreTrainedTokenizerBase, work: Path
) -> tuple[Path, list[dict[str, Any]]]:
    """The trained model and the metrics of its steps."""
    prompts = dict(list(task.held_out.items())[:CURVE_PROMPTS])

    def evaluate(step: int, model: PreTrainedModel) -> Mapping[str, Any]:
        return asdict(measure(model, tokenizer, prompts)[0]) if step % EVAL_STEPS == 0 else {}

    changes = {
        "output_dir": str(work / "run"),
        "save_steps": 10**6,
        "model": {"model_name_or_path": str(base)},
    }
    result = train_resolved(resolve(merge(cell.recipe, changes)), train_dataset=task.rows, evaluate=evaluate)
    lines = (result.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return result.final_dir, [json.loads(line) for line in lines]


def task_of(cell: Cell) -> Task:
    """The task drawn from the cell's seed; test cells share no prompt with the search."""
    demonstrations = int(cell.settings.get("demonstrations", 256))
    without = () if cell.seed >= SEARCH_SEED else make_task(seed=SEARCH_SEED, held_out=HELD_OUT).texts
    return make_task(seed=cell.seed, demonstrations=demonstrations, held_out=HELD_OUT, without=without)


def make_reference(path: Path) -> None:
    """Write a model of the expert: the base, fine-tuned on thousands of the expert's texts."""
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
    sync_tree(temporary)
    temporary.rename(path)
    sync(path.parent)


def _costs(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The curve, and the costs of the complete run without the measurements."""
    cost = {"rollout_tokens": 0, "trained_tokens": 0, "seconds": 0.0}
    curve: list[dict[str, Any]] = []
    for record in records:
        cost["rollout_tokens"] += record["tokens/rollout"]
        cost["trained_tokens"] += record["tokens/sft"] + record["tokens/rollout"]
        cost["seconds"] += record["step_time"]
        point = {name.removeprefix("eval/"): v for name, v in record.items() if name.startswith("eval/")}
        if point:
            kept = {name: record[name] for name in CURVE_METRICS if record.get(name) is not None}
            curve.append({"step": record["step"], **cost, **point, **kept})
    return {"curve": curve, "cost": cost}
