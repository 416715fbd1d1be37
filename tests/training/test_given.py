"""Objects and functions that a program passes to `uniapl.train`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import uniapl
from support.runs import evaluated, has_letter, lines, recipe, timeless
from support.tiny import letter_rows
from uniapl.errors import UsageError
from uniapl.training.checkpoint.directory import checkpoint_path

ROWS = [{"prompt": f"say {x * n}.", "letter": x} for n, x in enumerate("abcde")]
"""The rows of `evaluated`."""


def run(values: dict[str, Any], **given: Any) -> uniapl.RunResult:
    given = {"train_dataset": letter_rows(), "reward_functions": has_letter, "quiet": True} | given
    return uniapl.train(values, **given)


def without_model(model_dir: Path, output: Path, **changes: Any) -> dict[str, Any]:
    values = recipe(model_dir, output, max_steps=2, **changes)
    del values["model"]
    return values


def test_a_model_object_is_trained_as_from_its_directory(model_dir: Path, tmp_path: Path) -> None:
    """It is not changed, and the result has the trained weights."""
    run(recipe(model_dir, tmp_path / "directory", max_steps=2))
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    result = run(without_model(model_dir, tmp_path / "object"), model=model, processing_class=tokenizer)
    ours, theirs = (timeless(lines(tmp_path / name / "metrics.jsonl")) for name in ("object", "directory"))
    assert ours == theirs
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    saved = load_file(tmp_path / "directory" / "final" / "model.safetensors")
    trained = result.model.state_dict()
    assert all(torch.equal(trained[name], tensor) for name, tensor in saved.items())
    assert not all(torch.equal(before[name], tensor) for name, tensor in saved.items())


def test_the_start_of_an_existing_run_is_kept(model_dir: Path, tmp_path: Path) -> None:
    """The same call that resumes it, and one that may not replace it, leave its start model alone."""
    values = without_model(model_dir, tmp_path / "run")
    objects: dict[str, Any] = {
        "model": AutoModelForCausalLM.from_pretrained(model_dir),
        "processing_class": AutoTokenizer.from_pretrained(model_dir),
    }
    run(values, **objects)
    start = tmp_path / "run-start" / "model.safetensors"
    before = start.read_bytes()
    with torch.no_grad():
        next(objects["model"].parameters()).add_(1.0)
    with pytest.raises(UsageError, match="overwrite"):
        run(values, **objects)
    assert start.read_bytes() == before
    run({**values, "resume": "auto", "max_steps": 3}, **objects)
    assert start.read_bytes() == before
    run({**values, "overwrite": True}, **objects)
    assert start.read_bytes() != before


def test_on_step_end_gets_the_metrics_before_the_checkpoint(model_dir: Path, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    saved: list[bool] = []

    def on_step_end(record: Mapping[str, Any]) -> None:
        seen.append(dict(record))
        saved.append(checkpoint_path(tmp_path / "run", record["step"]).exists())

    run(recipe(model_dir, tmp_path / "run", max_steps=3, save_steps=1), on_step_end=on_step_end)
    assert seen == lines(tmp_path / "run" / "metrics.jsonl")
    assert saved == [False] * 3


def test_a_run_that_on_step_end_ended_is_continued(model_dir: Path, tmp_path: Path) -> None:
    def ends(record: Mapping[str, Any]) -> None:
        if record["step"] == 2:
            raise RuntimeError("enough")

    values = recipe(model_dir, tmp_path / "run", max_steps=3, save_steps=1)
    with pytest.raises(RuntimeError, match="enough"):
        run(values, on_step_end=ends)
    run({**values, "resume": "auto"})
    run(recipe(model_dir, tmp_path / "whole", max_steps=3, save_steps=1))
    ours, theirs = (timeless(lines(tmp_path / name / "metrics.jsonl")) for name in ("run", "whole"))
    assert ours == theirs


def test_an_evaluation_data_set_is_evaluated_like_a_file(model_dir: Path, tmp_path: Path) -> None:
    settings = evaluated(tmp_path)
    run(recipe(model_dir, tmp_path / "file", max_steps=2, **settings))
    settings["evaluation"]["suites"] = []
    for name, rows in {"eval": ROWS, "named": {"named": ROWS}}.items():
        run(recipe(model_dir, tmp_path / name, max_steps=2, **settings), eval_dataset=rows)
        (last,) = [x for x in lines(tmp_path / name / "metrics.jsonl") if f"eval/{name}/reward" in x]
        (other,) = [x for x in lines(tmp_path / "file" / "metrics.jsonl") if "eval/held_out/reward" in x]
        assert last["step"] == other["step"] == 2
        assert last[f"eval/{name}/reward"] == other["eval/held_out/reward"]


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({}, {"eval_dataset": ROWS}, "eval_dataset is never evaluated: set eval_steps"),
        ({}, {"model": 1}, r"the model is given twice: remove model\.model_name_or_path"),
        ({"model": {}}, {"model": 1}, "'processing_class' is missing"),
        ({}, {"processing_class": 1}, "'model' is missing"),
        ({"eval_steps": 2}, {"eval_dataset": {"held_out": ROWS}}, "two suites are called 'held_out'"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    changes: dict[str, Any], given: dict[str, Any], message: str, model_dir: Path, tmp_path: Path
) -> None:
    values = recipe(model_dir, tmp_path / "run", **(evaluated(tmp_path) if "eval_steps" in changes else {}))
    with pytest.raises(UsageError, match=message):
        run(values | changes, **given)
    assert not (tmp_path / "run").exists()
