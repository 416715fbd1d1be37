"""Running cells: in parallel, resumable, and with isolated failures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support.fakes import cells, fake_cell
from uniapl import cli
from uniapl.compare import cell as cell_module
from uniapl.compare import plan
from uniapl.compare.cell import run_cell
from uniapl.compare.plan import Cell
from uniapl.compare.runner import run_cells, search
from uniapl.demo.task import Task, make_task
from uniapl.errors import UniAPLError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "reference").mkdir()
    return tmp_path


def runs(directory: Path) -> list[str]:
    return (directory / "runs.txt").read_text().split()


def test_outcomes_have_the_order_of_the_cells_and_no_cell_runs_twice(directory: Path) -> None:
    three = cells(3)
    first = run_cells([*three, three[0]], directory, jobs=2, run=fake_cell)
    assert [outcome["cell"]["seed"] for outcome in first] == [0, 1, 2, 0]
    again = run_cells(cells(4), directory, jobs=2, run=fake_cell)
    assert again[:3] == first[:3]
    assert sorted(runs(directory)) == sorted(cell.name for cell in cells(4))


def test_a_failure_is_named_and_the_others_are_kept(directory: Path) -> None:
    bad = Cell(method="grpo", settings={"fails": 1}, seed=9)
    with pytest.raises(UniAPLError, match=rf"1 cells failed.*\n{bad.name}: RuntimeError: as told"):
        run_cells([bad, *cells(2)], directory, jobs=1, run=fake_cell)
    assert len(runs(directory)) == 2
    assert len(list((directory / "cells").glob("*.json"))) == 2


def test_a_killed_cell_does_not_affect_the_others(directory: Path) -> None:
    bad = Cell(method="grpo", settings={"dies": 1}, seed=9)
    with pytest.raises(UniAPLError, match=rf"1 cells failed.*\n{bad.name}: BrokenProcessPool"):
        run_cells([*cells(2, seconds=1), bad, *cells(2)], directory, jobs=2, run=fake_cell)
    assert len(list((directory / "cells").glob("*.json"))) == 4


def test_the_search_tries_learning_rates_and_then_the_setting(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uniapl.compare.runner._run_cell", fake_cell)
    found = search(["grpo"], directory, jobs=2)
    assert found == {"grpo": {"optim.learning_rate": 5e-4, "objective.beta": 0.02}}
    assert len(runs(directory)) == 5, "three rates, then two further values of the knob"


def test_a_best_rate_at_the_end_adds_the_next_one(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uniapl.compare.runner._run_cell", fake_cell)
    monkeypatch.setattr("uniapl.compare.runner.LEARNING_RATES", (1e-3, 2e-3))
    found = search(["grpo"], directory, jobs=2)
    assert found["grpo"]["optim.learning_rate"] == 5e-4


KILLED = """
import signal
import sys
from pathlib import Path
from support.fakes import cells, fake_cell
from uniapl.compare.runner import run_cells
if __name__ == "__main__":
    # A process started in the background may ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_cells(cells(6, seconds=0.5), Path(sys.argv[1]), jobs=1, run=fake_cell)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_comparison_continues(how: signal.Signals, directory: Path) -> None:
    script = directory / "script.py"
    script.write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen([sys.executable, str(script), str(directory)], env=environment)
    done = directory / "cells"
    while not done.exists() or len(list(done.glob("*.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(how)
    process.wait(timeout=30)
    finished = {path.stem: path.read_text() for path in done.glob("*.json")}
    assert 2 <= len(finished) < 6
    outcomes = run_cells(cells(6, seconds=0.5), directory, jobs=1, run=fake_cell)
    assert len(outcomes) == 6
    ran = runs(directory)
    assert all(ran.count(name) == 1 for name in finished), "a finished cell is never run again"
    assert all(json.loads(text) in outcomes for text in finished.values())


@pytest.mark.parametrize("method", ["uniapl", "sft -> grpo"])
def test_a_cell_is_reproducible(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(cell: Cell) -> Task:
        return make_task(seed=cell.seed, prompts=24, demonstrations=12, held_out=8)

    monkeypatch.setattr(plan, "STEPS", 2)
    monkeypatch.setattr(cell_module, "EVAL_STEPS", 1)
    monkeypatch.setattr(cell_module, "task_of", small)
    settings = {**plan.SETTINGS[method], "batching.prompts_per_step": 2}
    monkeypatch.setitem(
        plan.PIPELINES, "sft -> grpo", ({"method": "sft", "max_steps": 1}, {"method": "grpo"})
    )
    base = Path(cell_module.__file__).parents[1] / "demo" / "base"
    cell = Cell(method=method, settings=settings, seed=5)
    first, second = run_cell(cell, base), run_cell(cell, base)
    for outcome in (first, second):
        assert outcome["cost"].pop("seconds") > 0
        for point in outcome["curve"]:
            point.pop("seconds")
    assert first == second
    steps = [point["step"] for point in first["curve"]]
    assert steps == ([1, 2] if method == "uniapl" else [1, 2, 3])
    assert first["cost"]["rollout_tokens"] == first["curve"][-1]["rollout_tokens"] > 0
    other = run_cell(Cell(method=method, settings=settings, seed=6), base)
    assert other["final"] != first["final"]


def test_costs_by_hand() -> None:
    """Stages and steps are added up, and a curve has the evaluated steps."""

    def record(step: int, rollout: int, trained: int, **others: float) -> dict[str, Any]:
        tokens = {"tokens/rollout": rollout, "tokens/sft": trained - rollout, "num_tokens": 1000}
        return {"step": step, "step_time": 2.0, **tokens, **others}

    records = [
        record(1, 0, 50),
        record(2, 40, 70, **{"eval/good": 0.5, "reward": 0.25}),
        record(3, 60, 80, **{"eval/good": 0.75}),
    ]
    got = cell_module._costs(records)
    assert got["cost"] == {"rollout_tokens": 100, "trained_tokens": 200, "seconds": 6.0}
    assert got["curve"] == [
        {"step": 2, "rollout_tokens": 40, "trained_tokens": 120, "seconds": 4.0, "good": 0.5, "reward": 0.25},
        {"step": 3, "rollout_tokens": 100, "trained_tokens": 200, "seconds": 6.0, "good": 0.75},
    ]


@pytest.mark.parametrize("text", ["", "{", "NOT JSON"])
def test_a_damaged_cell_is_named(text: str, directory: Path) -> None:
    (one,) = cells(1)
    run_cells([one], directory, jobs=1, run=fake_cell)
    (directory / "cells" / f"{one.name}.json").write_text(text)
    with pytest.raises(UniAPLError, match=rf"{one.name}.json' .*: delete it"):
        run_cells([one], directory, jobs=1, run=fake_cell)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "sft,grop"], "unknown method 'grop': choose from sft, grpo"),
        (["--parts", ""], "unknown part ''"),
        (["--seeds", "0"], "at least 1"),
        (["--seeds", "1000"], "below 1000"),
        (["--jobs", "-1"], "at least 1"),
    ],
)
def test_invalid_flags_of_compare(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["compare", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_interrupted_comparison_names_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("uniapl.cli.compare.compare", interrupted)
    assert cli.run(["compare"]) == 130
    assert "finished cells are kept" in capsys.readouterr().err
