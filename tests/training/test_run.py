"""What a run does besides training: signals, precision, environment, the last metrics."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.runs import has_letter, lines, recipe, train
from uniapl.errors import UniAPLError


def test_weight_decay_alone_does_not_move_the_policy(model_dir: Path, tmp_path: Path) -> None:
    """gad in its discriminator's warm-up has no active component."""
    settings = {"weight_decay": 1.0, "learning_rate": 0.1}
    values = recipe(model_dir, tmp_path / "run", method="gad", optim=settings, objective={"beta": 0.0})
    train(values | {"max_steps": 1}, reward_functions=[])
    start = load_file(model_dir / "model.safetensors")
    final = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert all(torch.equal(final[name], start[name]) for name in start)


def test_two_precisions_in_one_process_and_no_kl_to_oneself_in_bf16(model_dir: Path, tmp_path: Path) -> None:
    values = recipe(model_dir, tmp_path / "fp32", max_steps=1)
    train(values)
    changed = {"output_dir": str(tmp_path / "bf16"), "optim": {"bf16": True, "learning_rate": 1e-9}}
    result = train(values | changed)
    assert result.metrics["kl"] == 0.0, "the reference computes in the precision of the policy"


def test_accelerate_s_environment_does_not_scale_gradients(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = []
    for name, value in (("one", "1"), ("four", "4")):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", value)
        norms.append(train(recipe(model_dir, tmp_path / name, max_steps=1)).metrics["grad_norm"])
    assert norms[0] == norms[1]


def test_it_runs_without_git(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    train(recipe(model_dir, tmp_path / "run", max_steps=1))
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["git_commit"] is None


def test_the_last_metrics_of_a_finished_run(model_dir: Path, tmp_path: Path) -> None:
    values = recipe(model_dir, tmp_path / "run", max_steps=2)
    first = train(values)
    assert train(values | {"resume": "auto"}).metrics["loss"] == first.metrics["loss"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves_it(number: int, model_dir: Path, tmp_path: Path) -> None:
    """Stopped inside step 3 of 12, at save_steps 6: the run ends after step 3 and resumes to the same end."""
    calls = 0
    handler = signal.getsignal(number)  # a shell may have started us with SIGINT ignored

    def stopping(completions: list[str], letter: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 4:
            os.kill(os.getpid(), number)
        return has_letter(completions, letter)

    stopping.__name__ = "has_letter"
    values = {"max_steps": 12, "save_steps": 6}
    with pytest.raises(UniAPLError, match=r"continue from .*step-000003") as raised:
        train(recipe(model_dir, tmp_path / "stopped", **values), reward_functions=[stopping])
    assert raised.value.exit_code == 128 + number
    assert signal.getsignal(number) is handler
    train(recipe(model_dir, tmp_path / "stopped", resume="auto", **values))
    train(recipe(model_dir, tmp_path / "whole", **values))
    stopped, whole = (lines(tmp_path / name / "completions.jsonl") for name in ("stopped", "whole"))
    assert stopped == whole
