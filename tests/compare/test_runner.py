"""Running cells: in parallel, resumable, and with isolated failures."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from uniapl.compare.plan import Cell, Plan, parse_methods
from uniapl.compare.runner import Runner, search
from uniapl.config.resolve import resolve, stages_of
from uniapl.errors import UniAPLError

FAKE = (sys.executable, str(Path(__file__).parents[1] / "support" / "fake_cell.py"))


def runner(directory: Path, **changes: Any) -> Runner:
    return Runner(**{"directory": directory, "jobs": 2, "threads": 1, "worker": FAKE} | changes)


def cells(count: int, **settings: float) -> list[Cell]:
    return [Cell(method="grpo", settings=settings, seed=seed) for seed in range(count)]


def ran(directory: Path) -> list[str]:
    return [line.split()[0] for line in (directory / "runs.txt").read_text().splitlines()]


def test_outcomes_have_the_order_of_the_cells_and_no_cell_runs_twice(tmp_path: Path) -> None:
    three = cells(3)
    first = runner(tmp_path).run([*three, three[0]])
    assert [outcome["cell"]["seed"] for outcome in first] == [0, 1, 2, 0]
    again = runner(tmp_path).run(cells(4))
    assert again[:3] == first[:3]
    assert sorted(ran(tmp_path)) == sorted(cell.name for cell in cells(4))
    assert not list((tmp_path / "cells").glob("*.log"))


def test_threads_and_devices_of_each_process(tmp_path: Path) -> None:
    runner(tmp_path, threads=3, devices=["4", "7"]).run(cells(4, seconds=0.3))
    words = [line.split()[1:] for line in (tmp_path / "runs.txt").read_text().splitlines()]
    assert {tuple(word) for word in words} == {("3", "4"), ("3", "7")}


@pytest.mark.parametrize(
    ("how", "message"),
    [("fails", "exit code 1: ValueError: as told"), ("dies", "ended by signal 9: no output")],
)
def test_a_failure_is_named_and_the_others_are_kept(how: str, message: str, tmp_path: Path) -> None:
    bad = Cell(method="grpo", settings={how: 1}, seed=9)
    with pytest.raises(
        UniAPLError, match=rf"1 of 3 runs failed.*\n{bad.name}: {message} \(see .*{bad.name}.log"
    ):
        runner(tmp_path, jobs=1).run([bad, *cells(2)])
    assert len(ran(tmp_path)) == 2
    assert len(list((tmp_path / "cells").glob("*.json"))) == 2
    assert (tmp_path / "cells" / f"{bad.name}.log").exists()


def test_two_comparisons_never_share_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of a killed comparison may live on for a moment and delete its directory at its end."""
    program = (
        "import json, pathlib, sys; job = json.load(sys.stdin); "
        "pathlib.Path(job['result']).write_text(json.dumps({'work': job['work'], 'wall': 0}))"
    )
    (cell,) = cells(1)
    found = []
    for process in (11, 22):
        monkeypatch.setattr("os.getpid", lambda process=process: process)
        one = runner(tmp_path, worker=(sys.executable, "-c", program))
        found += [Path(outcome["work"]).name for outcome in one.run([cell])]
        one.file(cell).unlink()
    assert found == [f"{cell.name}-11", f"{cell.name}-22"]


def test_a_damaged_outcome_is_named(tmp_path: Path) -> None:
    (cell,) = cells(1)
    runner(tmp_path).run([cell])
    path = runner(tmp_path).file(cell)
    path.write_text("{")
    with pytest.raises(UniAPLError, match=f"cannot read the cell '{path}'.*delete it to run it again"):
        runner(tmp_path).run([cell])


def plan(rate: float) -> Plan:
    resolved = resolve({"method": "uniapl", "optim": {"learning_rate": rate}})
    return Plan(resolved=resolved, stages=[stage.config for stage in stages_of(resolved)])


def test_the_search_tries_learning_rates_and_then_the_setting(tmp_path: Path) -> None:
    # The optimum is a rate of 9e-3 and a beta of 0.02.
    found = search(plan(9e-3), parse_methods("grpo"), runner(tmp_path))
    assert found == {"grpo": {"optim.learning_rate": 9e-3, "objective.beta": 0.02}}
    assert len(ran(tmp_path)) == 6, "three rates, then three further values of the setting"


def test_a_best_rate_at_the_end_adds_the_next_one(tmp_path: Path) -> None:
    found = search(plan(1e-3), parse_methods("grpo[objective.beta=0.5]"), runner(tmp_path))
    assert found["grpo[objective.beta=0.5]"]["optim.learning_rate"] == 9e-3
    assert len(ran(tmp_path)) == 4, "a setting that is given is not searched"


def test_a_given_rate_is_not_searched(tmp_path: Path) -> None:
    (label, settings), *_ = search(
        plan(1e-3), parse_methods("grpo[optim.learning_rate=0.5]"), runner(tmp_path)
    ).items()
    assert settings["optim.learning_rate"] == 0.5
    assert len(ran(tmp_path)) == 4, label


KILLED = """
import signal
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_runner import cells, runner
# A process started in the background may ignore SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
runner(Path(sys.argv[1]), jobs=1).run(cells(6, seconds=0.5))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_comparison_continues(how: signal.Signals, tmp_path: Path) -> None:
    script = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)]
    process = subprocess.Popen(script, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    done = tmp_path / "cells"
    while not done.exists() or len(list(done.glob("*.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(how)
    process.wait(timeout=30)
    # A stand-in that a killed comparison left behind may finish its cell.
    time.sleep(0.7)
    finished = {path.stem: path.read_text() for path in done.glob("*.json")}
    assert 2 <= len(finished) < 6
    outcomes = runner(tmp_path).run(cells(6, seconds=0.5))
    assert len(outcomes) == 6
    assert all(ran(tmp_path).count(name) == 1 for name in finished), "a finished cell is never run again"
    assert all(
        path.read_text() == finished[path.stem] for path in done.glob("*.json") if path.stem in finished
    )
