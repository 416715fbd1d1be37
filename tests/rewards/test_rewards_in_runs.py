"""Reward functions in whole runs."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import uniapl
from support.runs import has_letter, lines, recipe, train
from support.tiny import letter_rows, save_model


def test_a_dead_reward_stops_the_run_though_it_does_not_apply_to_every_row(
    model_dir: Path, tmp_path: Path
) -> None:
    rows = [row if n % 2 else row | {"letter": None} for n, row in enumerate(letter_rows())]
    calls = 0

    def dies(completions: list[str], letter: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise TimeoutError
        return [0.0] * len(completions)

    values = recipe(model_dir, tmp_path / "run", max_steps=30, health={"max_skipped_steps": 2})
    with pytest.raises(uniapl.HealthStop, match="reward 'dies' failed on every sample: TimeoutError"):
        train(values, train_dataset=rows, reward_functions=[dies])
    last = lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["rewards/dies/error_rate"] > 0
    assert last["rewards/dies/timeout_rate"] == 0, "its own TimeoutError is an error, not our time-out"


def test_rewards_that_apply_to_no_row_are_refused(model_dir: Path, tmp_path: Path) -> None:
    rows = [row | {"letter": None} for row in letter_rows()]
    with pytest.raises(uniapl.UsageError, match="needs a column 'letter', but no row has a value for it"):
        train(recipe(model_dir, tmp_path / "run"), train_dataset=rows)


def test_a_reward_cannot_change_the_data(model_dir: Path, tmp_path: Path) -> None:
    rows = [row | {"notes": ["a"]} for row in letter_rows(4)]
    lengths: list[int] = []

    def greedy(completions: list[str], notes: list[list[str]]) -> list[float]:
        lengths.append(max(map(len, notes)))
        for note in notes:
            note.append("b")
        return [0.0] * len(completions)

    train(recipe(model_dir, tmp_path / "run"), train_dataset=rows, reward_functions=[greedy])
    assert set(lengths) == {1}


def test_an_answer_that_reads_none_is_an_answer(model_dir: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.csv"
    data.write_text("prompt,completion,letter\na,None,a\nb,NA,b\nc,,c\n")
    values = recipe(model_dir, tmp_path / "run", max_steps=1, data={"path": str(data)})
    uniapl.train(values, reward_functions=[has_letter])
    shown = {r["row"]: r["demonstration"] for r in lines(tmp_path / "run" / "completions.jsonl")}
    assert shown == {1: "None", 2: "NA", 3: None}


def test_reward_files_find_their_neighbours_and_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("VALUE = 0.5\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom helper import VALUE\n"
        "@dataclass\nclass A:\n    x: int = 1\n"
        "def f(completions):\n    return [VALUE] * len(completions)\n"
    )
    code = (
        "from uniapl.rewards.finding import find_function as find\n"
        f"assert find({str(tmp_path / 'mine.py')!r} + ':f')(['a']) == [0.5]\n"
        "assert find('mine:f')(['a']) == [0.5]\n"
    )
    # A console script does not have the working directory on its path: -P.
    subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, check=True, env=os.environ)


def test_a_reward_that_says_none_of_everything_is_pointed_out(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def silent(completions: list[str]) -> list[None]:
        return [None] * len(completions)

    train(recipe(model_dir, tmp_path / "run", max_steps=1), reward_functions=silent)
    assert "step 1: no rollout has a reward: every reward function returned None" in capsys.readouterr().out


def test_a_failing_reward_s_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine_too.py").write_text(
        "def f(completions):\n    return [c.strip() for c in completions]\n"
    )
    chat = [{"prompt": [{"role": "user", "content": "a"}]}]
    path = save_model(tmp_path / "model", chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    rewards = {"functions": f"{tmp_path / 'mine_too.py'}:f"}
    values = recipe(path, tmp_path / "run", method="grpo", rewards=rewards)
    with pytest.raises(uniapl.UsageError, match=r"strip' \(mine_too.py, line 2\); .*c\[-1\]\['content'\]"):
        train(values, train_dataset=chat, reward_functions=[])


def test_groups_that_are_all_equal_are_neither_good_nor_bad(model_dir: Path, tmp_path: Path) -> None:
    def constant(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    record = train(recipe(model_dir, tmp_path / "run", max_steps=1), reward_functions=[constant]).metrics
    assert record["frac_reward_zero_std"] == 1
    assert record["groups/all_good"] is None
    assert record["groups/all_bad"] is None


@pytest.mark.case(22)
def test_four_perfect_answers_of_three_weighted_functions_pass(model_dir: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.py").write_text("def f(completions):\n    return [1.0] * len(completions)\n")
    functions = [
        {"name": f"{tmp_path / name}.py:f", "weight": weight}
        for name, weight in zip("abc", (0.6, 0.3, 0.1), strict=True)
    ]
    values = recipe(model_dir, tmp_path / "run", max_steps=1, rewards={"functions": functions})
    record = train(values, reward_functions=[]).metrics
    assert record["reward"] == pytest.approx(1.0)
    assert (record["pass_rate"], record["frac_reward_zero_std"], record["groups/mixed"]) == (1.0, 1.0, 0.0)
    rows = lines(tmp_path / "run" / "completions.jsonl")
    assert {c["advantage"] for row in rows for c in row["completions"]} == {0.0}


def test_the_state_and_the_logs_of_a_run(model_dir: Path, tmp_path: Path) -> None:
    states: list[tuple[int, int, float, int, bool]] = []

    def f(completions: list[str], trainer_state: Any, log_extra: Any, log_metric: Any) -> list[float]:
        s = trainer_state
        states.append((s.global_step, s.max_steps, s.epoch, len(s.log_history), s.is_world_process_zero))
        log_extra("upper", [c.upper() for c in completions])
        log_metric("letters", sum(map(len, completions)) / len(completions))
        log_metric("loss", 7.0)
        return [float(len(c)) for c in completions]

    data = tmp_path / "held_out.jsonl"
    data.write_text('{"prompt": "say a"}\n')
    evaluation = {"suites": [str(data)], "max_completion_length": 4}
    values = recipe(
        model_dir, tmp_path / "run", method="grpo", max_steps=3, evaluation=evaluation, eval_steps=3
    )
    train(values, reward_functions=[f], train_dataset=letter_rows(6))
    # Two trial calls, of the run and of the suite; three steps; the suite after the last step.
    assert [s[0] for s in states] == [0, 0, 0, 1, 2, 2]
    assert {s[1] for s in states} == {3}
    assert [s[2] for s in states[2:5]] == [0.5, 1.0, 1.5]
    assert [s[3] for s in states[2:5]] == [0, 1, 2]
    assert all(s[4] for s in states)
    records = lines(tmp_path / "run" / "metrics.jsonl")
    groups = lines(tmp_path / "run" / "completions.jsonl")
    for record in records:
        shown = [c for g in groups if g["step"] == record["step"] for c in g["completions"]]
        assert [c["extra"] for c in shown] == [{"upper": c["text"].upper()} for c in shown]
        assert record["letters"] == pytest.approx(sum(len(c["text"]) for c in shown) / len(shown))
        assert record["log_metric/loss"] == 7.0
        assert record["loss"] != 7.0


def test_a_reward_function_that_changes_the_working_directory(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The suite's path stays relative to the directory in which the run was started."""

    def f(completions: list[str], **columns: Any) -> list[float]:
        os.chdir(elsewhere)
        return [float(len(c)) for c in completions]

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "say a"}\n')
    evaluation = {"suites": ["held_out.jsonl"], "max_completion_length": 4}
    values = recipe(model_dir, tmp_path / "run", method="grpo", max_steps=1, evaluation=evaluation)
    found = train(values | {"eval_steps": 1}, reward_functions=[f]).metrics
    assert found["eval/held_out/reward"] is not None
