"""What one of two processes does for both of them: checks, checksums, and the start of a run."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from support.processes import run_processes
from support.runs import evaluated, has_letter, lines, recipe, train
from support.tiny import letter_rows
from uniapl.errors import UniAPLError
from uniapl.rewards import RowCheck
from uniapl.rewards.sandbox import Sandbox
from uniapl.training import api
from uniapl.training.checkpoint import directory as checkpoint
from uniapl.training.checkpoint import disk

VERIFIED = {
    "eval_func": [
        "def evaluate(response): return 'e' not in response",
        "def evaluate(response): return False",
    ],
    "cases": [["e", False], ["a", True], ["b", True]],
}
"""A function that is right and one that is not, for every row."""
JUDGED = {"rewards": {"functions": ["code_verifiers"], "allow_code_verifiers": True}, "method": "grpo"}


class Events:
    """What happens in this process, in order, in a file of its own."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"events-{torch.distributed.get_rank()}.jsonl"

    def add(self, event: str) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def before(self, owner: Any, name: str, event: Callable[..., str]) -> None:
        """Record an event before each call of a function, from its arguments."""
        original = getattr(owner, name)

        def recorded(*arguments: Any, **settings: Any) -> Any:
            self.add(event(*arguments, **settings))
            return original(*arguments, **settings)

        setattr(owner, name, recorded)


def own_reward(events: Events) -> Callable[..., Any]:
    """A function with a check of its own, whose result it needs."""

    def scored(completions: list[str], letter: list[str]) -> list[float]:
        events.add(f"scored {len(completions)}")
        return has_letter(completions, letter)

    def check_rows(examples: list[Any], **_: Any) -> RowCheck:
        events.add(f"checked {len(examples)}")
        return RowCheck(state=len(examples))

    scored.check_rows = check_rows  # type: ignore[attr-defined]
    scored.load_state = lambda state: events.add(f"state {state}")  # type: ignore[attr-defined]
    return scored


def _run_and_resume(folder: Path, model: Path, changes: dict[str, Any]) -> None:
    events = Events(folder)
    events.before(Sandbox, "run", lambda _, jobs: f"sandbox {len(jobs)}")
    events.before(checkpoint, "_sha256", lambda path: f"sha256 {path.name}")
    events.before(api, "start_run", lambda *_: "start")
    rows = [row | VERIFIED for row in letter_rows(4)]
    for settings in ({"max_steps": 1}, {"max_steps": 2, "resume": "auto"}):
        events.add("new run")
        values = recipe(model, folder / "run", save_steps=1, **changes | settings)
        train(values, train_dataset=rows, reward_functions=[own_reward(events)])


def starts(path: Path) -> list[tuple[list[str], list[str]]]:
    """The events of each run before its directory is changed, and those after that."""
    found: list[tuple[list[str], list[str]]] = []
    for event in lines(path):
        if event == "new run":
            found.append(([], []))
            part = found[-1][0]
        elif event == "start":
            part = found[-1][1]
        elif event != "sandbox 0":
            part.append(event)
    return found


@pytest.mark.distributed
def test_checks_and_checksums_are_made_by_one_process(model_dir: Path, tmp_path: Path) -> None:
    """Verifiers, trial calls, and the checksums of a resumed checkpoint; each process scores its rollouts."""
    changes = JUDGED | evaluated(tmp_path)
    suite = Path(changes["evaluation"]["suites"][0])
    suite.write_text("".join(json.dumps(row | VERIFIED) + "\n" for row in lines(suite)))
    assert run_processes(2, _run_and_resume, tmp_path, model_dir, changes) == [0, 0]
    zero, one = (starts(tmp_path / f"events-{rank}.jsonl") for rank in (0, 1))
    # Two functions on three cases. The suite's rows have the same, which have their verdicts already.
    data = ["sandbox 6", "checked 4", "state 4", "sandbox 2", "scored 2"]
    suite_rows = ["checked 5", "state 5", "sandbox 2", "scored 2"]
    assert zero[0][0] == data + suite_rows
    assert [before for before, _ in one] == [["state 4", "state 5"]] * 2, "it calls and reads nothing"
    manifest = json.loads((checkpoint.checkpoint_path(tmp_path / "run", 1) / checkpoint.MANIFEST).read_text())
    read = [event for event in zero[1][0] if event.startswith("sha256")]
    assert sorted(read) == sorted(f"sha256 {name}" for name in manifest), "each file once"
    # Three prompts with four rollouts, and the five prompts of the suite; no verifier is tested again.
    scored = [[event for event in after if not event.startswith("sha256")] for _, after in (zero[0], one[0])]
    assert scored == [
        ["sandbox 8", "scored 8", "sandbox 3", "scored 3"],
        ["sandbox 4", "scored 4", "sandbox 2", "scored 2"],
    ]


def _refusals(folder: Path, model: Path) -> None:
    rank = torch.distributed.get_rank()
    events = Events(folder)

    def raising(error: Exception) -> Callable[..., Any]:
        def check(completions: list[str]) -> list[float]:
            return [0.0] * len(completions)

        def check_rows(examples: list[Any], **_: Any) -> RowCheck:
            raise error

        check.check_rows = check_rows  # type: ignore[attr-defined]
        return check

    def refused(name: str, *, method: str = "grpo", **settings: Any) -> None:
        try:
            train(recipe(model, folder / name, method=method, max_steps=1), **settings)
        except UniAPLError as error:
            events.add(f"{name}: {error.exit_code}: {error}")
        except ZeroDivisionError:
            events.add(f"{name}: the user's error")

    refused("check", reward_functions=[raising(api.UsageError("row 3: it cannot be checked"))])
    refused("crash", reward_functions=[raising(ZeroDivisionError("of the user"))])
    refused("trial", reward_functions=[lambda completions: []])
    refused("data", train_dataset=letter_rows(4 + rank))
    refused("recipe", method=("grpo", "sft")[rank])
    with disk.exclusive(folder / "taken") if rank == 0 else nullcontext():
        torch.distributed.barrier()
        refused("taken")
    (folder / f"file-{rank}").touch()
    refused("file-0")
    assert not (folder / "check").exists()


@pytest.mark.distributed
def test_what_stops_one_process_stops_both(model_dir: Path, tmp_path: Path) -> None:
    """With the same message and exit code 2; nothing waits for a process that has ended."""
    assert run_processes(2, _refusals, tmp_path, model_dir) == [0, 0]
    zero, one = (lines(tmp_path / f"events-{rank}.jsonl") for rank in (0, 1))
    expected = [
        "check: 2: row 3: it cannot be checked",
        "crash: the user's error",
        "trial: 2: reward function '<lambda>' fails on rows 1, 2 of the data: WrongFormError",
        "data: 2: the data of rank 1 differs from that of rank 0: start every process with",
        "recipe: 2: the recipe of rank 1 differs from that of rank 0: start every process with",
        f"taken: 2: another run is using output_dir '{tmp_path / 'taken'}'",
        f"file-0: 2: output_dir '{tmp_path / 'file-0'}' cannot be written",
    ]
    for said, start in zip(zero, expected, strict=True):
        assert said.startswith(start.split("WrongForm")[0]), said
    assert one[1] == "crash: 1: rank 0 failed: ZeroDivisionError('of the user')"
    assert [*one[:1], *one[2:]] == [*zero[:1], *zero[2:]]
