"""Trackers: the name and the group of a run, and trackers that are missing or fail."""

import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import accelerate.tracking
import pytest

import uniapl
from support.runs import lines, recipe, timeless, train, write_recipe
from uniapl import cli
from uniapl.compare.cell import Job, tracking
from uniapl.compare.plan import Cell


class Tracker:
    """Stands for the modules and the runs of wandb, trackio and mlflow; it can fail."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(update=lambda values, **_: None)
        self.utils = SimpleNamespace(
            validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=9, MAX_PARAMS_TAGS_PER_BATCH=9)
        )
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, float]] = []
        self.finished = 0
        self.fails: set[str] = set()

    def init(self, **arguments: Any) -> "Tracker":
        if "start" in self.fails:
            raise RuntimeError("no API key\n  configured.")
        self.started.append(arguments)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        if f"log {step}" in self.fails:
            raise ConnectionError("the server is gone")
        self.logged.append((step, values["loss"]))

    def finish(self) -> None:
        self.finished += 1
        if "finish" in self.fails:
            raise ConnectionError("the server is gone")

    # Those of mlflow.
    search_experiments = staticmethod(lambda filter_string: [])
    create_experiment = staticmethod(lambda name, **_: name)
    log_params = staticmethod(lambda params: None)
    start_run, log_metrics, end_run = init, log, finish


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Tracker:
    """All three are installed."""
    fake: Any = Tracker()
    for name in ("wandb", "trackio", "mlflow"):
        module: Any = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="fake")
        for key in ("init", "config", "utils", "search_experiments", "create_experiment", "log_params"):
            setattr(module, key, getattr(fake, key))
        for key in ("start_run", "log_metrics", "end_run"):
            setattr(module, key, getattr(fake, key))
        monkeypatch.setitem(sys.modules, name, module)
    installed = [accelerate.tracking.LoggerType(name) for name in ("wandb", "trackio", "mlflow")]
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", installed)
    return fake


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_the_name_and_the_group_of_a_run(
    name: str, model_dir: Path, tmp_path: Path, tracker: Tracker
) -> None:
    train(recipe(model_dir, tmp_path / "first", report_to=[name], max_steps=1))
    named = {"run_name": "seed 1", "run_group": "primes"}
    train(recipe(model_dir, tmp_path / "second", report_to=[name], max_steps=1, **named))
    keys = {"mlflow": ("run_name", "tags")}.get(name, ("name", "group"))
    first, second = ([run.get(key) for key in keys] for run in tracker.started)
    assert first == ["first", None]
    assert second == ["seed 1", {"group": "primes"} if name == "mlflow" else "primes"]
    if name != "mlflow":
        assert "group" not in tracker.started[0]
        assert [run["project"] for run in tracker.started] == ["uniapl"] * 2
    written = [lines(tmp_path / run / "metrics.jsonl")[0]["loss"] for run in ("first", "second")]
    assert tracker.logged == [(1, loss) for loss in written]
    assert tracker.finished == 2


@pytest.mark.parametrize("verb", ["check", "train"])
def test_a_directory_of_the_tracker_s_name_is_no_package(
    verb: str,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """wandb writes to ./wandb, and `python -m` searches the working directory."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write_recipe(tmp_path, model_dir, report_to=["wandb"])
    assert cli.run([verb, str(path)]) == 2
    assert capsys.readouterr().err == "error: report_to: 'wandb' is not installed: pip install wandb\n"


def test_a_tracker_that_does_not_start(model_dir: Path, tmp_path: Path, tracker: Tracker) -> None:
    tracker.fails = {"start"}
    said = (
        r"report_to: wandb did not start: RuntimeError: no API key configured\. Correct its settings or "
        "remove it from report_to, and continue with --resume auto"
    )
    with pytest.raises(uniapl.UniAPLError, match=said):
        train(recipe(model_dir, tmp_path / "run", report_to=["wandb"], max_steps=1))
    assert lines(tmp_path / "run" / "metrics.jsonl") == []
    train(recipe(model_dir, tmp_path / "run", resume="auto", max_steps=1))
    assert [record["step"] for record in lines(tmp_path / "run" / "metrics.jsonl")] == [1]


def test_a_tracker_that_fails_does_not_fail_the_run(
    model_dir: Path, tmp_path: Path, tracker: Tracker, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe(model_dir, tmp_path / "without", max_steps=4))
    tracker.fails = {"log 2"}
    capsys.readouterr()
    train(recipe(model_dir, tmp_path / "run", report_to=["wandb"], max_steps=4))
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("warning: report_to") == 1
    assert (
        "step 2: warning: report_to: wandb failed and gets no more metrics: ConnectionError: the server is "
        "gone. metrics.jsonl has every step"
    ) in out
    ours, theirs = (timeless(lines(tmp_path / run / "metrics.jsonl")) for run in ("run", "without"))
    assert ours == theirs
    assert [step for step, _ in tracker.logged] == [1]


def test_a_tracker_that_does_not_close_does_not_fail_the_run(
    model_dir: Path, tmp_path: Path, tracker: Tracker, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker.fails = {"finish"}
    result = train(recipe(model_dir, tmp_path / "run", report_to=["wandb"], max_steps=1))
    out = " ".join(capsys.readouterr().out.split())
    assert "warning: report_to: wandb did not close: ConnectionError: the server is gone" in out
    assert (result.final_dir / "model.safetensors").is_file()


@pytest.mark.parametrize("group", [None, "mine"])
def test_runs_of_a_comparison_are_one_group(group: str | None, tmp_path: Path) -> None:
    base = {"report_to": ["tensorboard", "wandb"], "run_group": group}
    cell = Cell(method="grpo", seed=2)
    job = Job(
        cell=cell,
        cut={},
        base=base,
        eval_steps=0,
        work=str(tmp_path / "primes" / "work"),
        result=str(tmp_path / "primes" / "cells" / "one.json"),
    )
    expected = {"report_to": ["wandb"], "run_name": cell.name, "run_group": group or "primes"}
    assert tracking(Job.from_json(job.to_json())) == expected
