"""Evaluation before the first step, the best checkpoint as the result, and the card of a complete run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import uniapl
from support.runs import assert_same_run, lines, recipe, run_until, timeless, train
from uniapl.training.checkpoint import directory as checkpoint

SCORES = {0: 0.9, 1: 0.2, 2: 0.5, 3: 0.8, 4: 0.7, 5: 0.8, 6: 0.1}
"""Of these steps, 3 is the first best one; step 0 has no checkpoint."""
BEST = {"early_stopping": {"metric": "eval/score"}, "load_best_model_at_end": True, "max_steps": 6}


def scores(step: int, model: Any) -> dict[str, float]:
    return {"score": SCORES[step]}


def steps_of(run: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.checkpoints(run)]


def same_model(one: Path, other: Path, file: str = "model.safetensors") -> bool:
    ours, theirs = load_file(one / file), load_file(other / file)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("lora", [False, True], ids=["weights", "adapter"])
def test_the_best_checkpoint_is_kept_and_is_the_result(lora: bool, model_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    values = recipe(model_dir, run, **BEST, save_steps=1, save_total_limit=1)
    if lora:
        values["model"] |= {"lora_r": 2}
    train(values, evaluate=scores)
    assert steps_of(run) == [3, 6]
    named = json.loads((run / "best.json").read_text())
    assert named == {
        "step": 3,
        "checkpoint": "checkpoints/step-000003",
        "metric": "eval/score",
        "value": 0.8,
    }
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    best = run / named["checkpoint"]
    assert same_model(run / "final", best, file)
    assert not same_model(run / "final", checkpoint.checkpoint_path(run, 6), file)
    assert not checkpoint.defects(run / "final")
    assert "3 steps" in (run / "final" / "README.md").read_text()
    plain = recipe(model_dir, tmp_path / "plain", save_steps=1, max_steps=6)
    plain["model"] = values["model"]
    train(plain, evaluate=scores)
    names = {path.name for path in (tmp_path / "plain" / "final").iterdir()}
    assert {path.name for path in (run / "final").iterdir()} == names
    AutoModelForCausalLM.from_pretrained(run / "final")


def test_an_improvement_is_saved_between_checkpoints(model_dir: Path, tmp_path: Path) -> None:
    """Steps 1, 2 and 3 improve; the others do not, and 6 is the last step."""
    train(recipe(model_dir, tmp_path / "run", **BEST, save_steps=50, save_total_limit=9), evaluate=scores)
    assert steps_of(tmp_path / "run") == [1, 2, 3, 6]


def test_a_training_metric_is_compared_at_checkpoints(model_dir: Path, tmp_path: Path) -> None:
    rule = {"metric": "sft/nll", "greater_is_better": False}
    values = recipe(model_dir, tmp_path / "run", **{**BEST, "early_stopping": rule}, save_steps=2)
    train(values, evaluate=scores)
    losses = {r["step"]: r["sft/nll"] for r in lines(tmp_path / "run" / "metrics.jsonl")}
    best = min((2, 4, 6), key=lambda step: losses[step])
    assert json.loads((tmp_path / "run" / "best.json").read_text())["step"] == best
    assert same_model(tmp_path / "run" / "final", checkpoint.checkpoint_path(tmp_path / "run", best))


@pytest.mark.parametrize("killed_after", [2, 4])
def test_a_resumed_run_has_the_same_best_checkpoint(
    killed_after: int, model_dir: Path, tmp_path: Path
) -> None:
    values = {**BEST, "save_steps": 2, "save_total_limit": 1}
    train(recipe(model_dir, tmp_path / "whole", **values), evaluate=scores)
    run_until(killed_after, recipe(model_dir, tmp_path / "cut", **values), evaluate=scores)
    train(recipe(model_dir, tmp_path / "cut", resume="auto", **values), evaluate=scores)
    assert_same_run(tmp_path / "cut", tmp_path / "whole", 6)
    assert steps_of(tmp_path / "cut") == steps_of(tmp_path / "whole") == [3, 6]
    for name in ("best.json", "final/README.md"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert same_model(tmp_path / "cut" / "final", tmp_path / "whole" / "final")


def test_each_checksum_is_verified_once_per_start(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a checkpoint that is both the newest one and the best one."""
    values = recipe(model_dir, tmp_path / "run", **BEST)
    train(values | {"max_steps": 3}, evaluate=scores)
    newest = checkpoint.checkpoint_path(tmp_path / "run", 3)
    read: list[Path] = []
    verify = checkpoint._sha256
    monkeypatch.setattr(checkpoint, "_sha256", lambda path: read.append(path) or verify(path))
    train(values | {"max_steps": 4, "resume": "auto"}, evaluate=scores)
    names = json.loads((newest / checkpoint.MANIFEST).read_text())
    assert sorted(path for path in read if path.is_relative_to(newest)) == sorted(
        newest / name for name in names
    )


def test_a_best_checkpoint_that_is_gone_is_noted(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    values = {**BEST, "save_steps": 2, "max_steps": 4}
    train(recipe(model_dir, run, **values), evaluate=scores)
    (checkpoint.checkpoint_path(run, 3) / "model.safetensors").unlink()
    train(recipe(model_dir, run, **values | {"max_steps": 6, "resume": "auto"}), evaluate=scores)
    assert "the best checkpoint so far, of step 3, cannot be used" in capsys.readouterr().out
    assert json.loads((run / "best.json").read_text())["step"] == 5


def test_another_rule_keeps_the_best_checkpoint_and_another_metric_does_not(
    model_dir: Path, tmp_path: Path
) -> None:
    for name, changed, best in (
        ("patience", {"metric": "eval/score", "patience": 9}, 3),
        ("metric", {"metric": "eval/score", "greater_is_better": False}, 6),
    ):
        run = tmp_path / name
        train(recipe(model_dir, run, **{**BEST, "max_steps": 4}), evaluate=scores)
        values = recipe(model_dir, run, **{**BEST, "early_stopping": changed}, resume="auto")
        train(values, evaluate=scores)
        assert json.loads((run / "best.json").read_text())["step"] == best


def test_a_metric_without_values_is_reported(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rule = {"metric": "eval/other"}
    train(recipe(model_dir, tmp_path / "run", **{**BEST, "early_stopping": rule}), evaluate=scores)
    assert "'eval/other' had no value at a checkpoint" in capsys.readouterr().out
    assert not (tmp_path / "run" / "best.json").exists()


def test_what_nothing_measures_is_refused(model_dir: Path, tmp_path: Path) -> None:
    for changes, message in (
        (BEST, "load_best_model_at_end: nothing measures 'eval/score'"),
        ({"eval_on_start": True}, "eval_on_start: there is nothing to evaluate"),
    ):
        with pytest.raises(uniapl.UsageError, match=message):
            train(recipe(model_dir, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_step_0_is_the_model_before_training(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It changes nothing else: not the steps, not the best checkpoint, not the health rules."""
    start = load_file(model_dir / "model.safetensors")["model.norm.weight"]

    def measured(step: int, model: Any) -> dict[str, float]:
        change = (model.model.norm.weight.cpu() - start).abs().sum().item()
        return {"change": change, "score": SCORES[step]}

    changes = {**BEST, "health": {"window": 2}, "save_steps": 2}
    train(recipe(model_dir, tmp_path / "without", **changes), evaluate=measured)
    train(recipe(model_dir, tmp_path / "with", eval_on_start=True, **changes), evaluate=measured)
    first, *records = lines(tmp_path / "with" / "metrics.jsonl")
    assert timeless([first]) == [{"step": 0, "stage": 0, "eval/change": 0.0, "eval/score": 0.9}]
    assert timeless(records) == timeless(lines(tmp_path / "without" / "metrics.jsonl"))
    assert "no report was written" not in capsys.readouterr().out
    run_until(2, recipe(model_dir, tmp_path / "cut", eval_on_start=True, **changes), evaluate=measured)
    resumed = recipe(model_dir, tmp_path / "cut", eval_on_start=True, resume="auto", **changes)
    train(resumed, evaluate=measured)
    again = timeless(lines(tmp_path / "cut" / "metrics.jsonl"))
    assert again == timeless([first, *records])


def test_a_start_without_a_checkpoint_evaluates_step_0_once(model_dir: Path, tmp_path: Path) -> None:
    values = {"eval_on_start": True, "save_steps": 9, "max_steps": 2}
    run_until(1, recipe(model_dir, tmp_path / "run", **values), evaluate=scores)
    train(recipe(model_dir, tmp_path / "run", resume="auto", **values), evaluate=scores)
    assert [r["step"] for r in lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]


@pytest.mark.parametrize("final", ["kept", "deleted"])
def test_the_card_of_a_complete_run_is_about_its_training(
    final: str, model_dir: Path, tmp_path: Path
) -> None:
    """Resumed with other values, no step uses them."""
    run = tmp_path / "run"
    train(recipe(model_dir, run))
    card = (run / "final" / "README.md").read_text()
    if final == "deleted":
        checkpoint.remove(run / "final")
    changed = {"seed": 5, "optim": {"learning_rate": 0.5}, "rollout": {"max_completion_length": 5}}
    train(recipe(model_dir, run, resume="auto", **changed))
    assert (run / "final" / "README.md").read_text() == card
    assert "learning rate 0.003," in card
