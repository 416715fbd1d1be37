"""`num_train_epochs` gives the number of steps, by the rows of the stream that a method steps through."""

import json
from pathlib import Path
from typing import Any

import pytest

import uniapl
from support.runs import assert_same_run, has_letter, lines, recipe, run_until, train, write_recipe
from support.tiny import letter_rows
from uniapl import cli
from uniapl.config.resolve import load_recipe, resolve, stages_of
from uniapl.training.checkpoint import directory as checkpoint
from uniapl.training.given import Given
from uniapl.training.preflight.epochs import with_max_steps
from uniapl.training.preflight.load import load_inputs


def steps(model_dir: Path, rows: list[dict[str, Any]], **values: Any) -> list[int]:
    base = recipe(model_dir, Path("unused"), **values)
    resolved = resolve({key: value for key, value in base.items() if key != "max_steps"})
    stages = stages_of(resolved)
    inputs = load_inputs(resolved, stages, Given(train_dataset=rows, reward_functions=[has_letter]))
    return [with_max_steps(stage, inputs.dataset, inputs.rewarder).config.max_steps for stage in stages]


@pytest.mark.parametrize(
    ("method", "epochs", "expected"),
    [
        ("sft", 1, 2),  # 6 demonstrations, 5 per step
        ("sft", 2, 3),
        ("sft", 0.01, 1),
        ("grpo", 1, 4),  # 12 prompts, 3 per step
        ("grpo", 1.01, 5),
        ("grpo", 0.5, 2),
        ("uniapl", 3, 12),
        ("chord-mu", 1, 4),
    ],
)
def test_steps_of_a_method(method: str, epochs: float, expected: int, model_dir: Path) -> None:
    assert steps(model_dir, letter_rows(), method=method, num_train_epochs=epochs) == [expected]


def test_a_cold_start_without_prompts_is_added(model_dir: Path) -> None:
    """An epoch counts the steps with rollouts."""
    rows = letter_rows()
    plain = steps(model_dir, rows, num_train_epochs=1)
    assert steps(model_dir, rows, num_train_epochs=1, batching={"cold_start_steps": 5}) == [plain[0] + 5]
    assert steps(model_dir, rows, num_train_epochs=1, batching={"cold_start_steps": 0.5}) == [2 * plain[0]]


def test_only_usable_rows_of_the_stream_count(model_dir: Path) -> None:
    """Rows without the reward's column have no prompt for grpo; rows that are too long are left out."""
    rows = [{"prompt": "say a."}] * 5 + letter_rows(6, demonstrated=())
    rows += [{"prompt": "a" * 300, "letter": "a"}] * 9
    assert steps(model_dir, rows, method="grpo", num_train_epochs=1) == [2]


def test_an_epoch_is_not_rounded_in_floating_point(model_dir: Path) -> None:
    """0.1 * 30 is 3.0000000000000004."""
    batching = {"prompts_per_step": 1}
    assert steps(model_dir, letter_rows(30), method="grpo", num_train_epochs=0.1, batching=batching) == [3]


def test_stages_have_their_own_length_or_the_recipe_s(model_dir: Path) -> None:
    stages = [
        {"method": "sft", "num_train_epochs": 2},
        {"method": "grpo"},
        {"method": "grpo", "max_steps": 7},
    ]
    assert steps(model_dir, letter_rows(), stages=stages, num_train_epochs=0.5) == [3, 2, 7]
    assert steps(model_dir, letter_rows(), stages=stages) == [3, 100, 7]
    resolved = resolve({"max_steps": 9, "stages": stages})
    assert [stage.config.max_steps for stage in stages_of(resolved)][1:] == [9, 7]


def test_both_lengths_are_refused() -> None:
    message = r"num_train_epochs \({}\) and max_steps \({}\) both set the number of steps"
    for values, flags, sources in (
        ({"max_steps": 3, "num_train_epochs": 1}, [], ("recipe", "recipe")),
        ({"max_steps": 100}, ["--num-train-epochs", "1"], ("flag", "recipe")),
        ({"num_train_epochs": 1}, ["--max-steps", "100"], ("recipe", "flag")),
    ):
        with pytest.raises(uniapl.UsageError, match=message.format(*sources)):
            resolve(values, flags)
    both = {"method": "sft", "max_steps": 1, "num_train_epochs": 1}
    with pytest.raises(uniapl.UsageError, match="stage 1: num_train_epochs"):
        stages_of(resolve({"stages": [both]}))
    for wrong in (0, -1, "many"):
        with pytest.raises(uniapl.UsageError, match="num_train_epochs: must be"):
            resolve({"num_train_epochs": wrong})
    assert resolve({"num_train_epochs": 1}, ["--max-steps", "3", "--num-train-epochs", "null"])


def test_a_run_of_epochs_resumes_exactly_and_can_be_extended(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def values(run: str, epochs: float, **changes: Any) -> dict[str, Any]:
        found = recipe(model_dir, tmp_path / run, num_train_epochs=epochs, save_steps=2, **changes)
        return {key: value for key, value in found.items() if key != "max_steps"}

    assert train(values("whole", 1)).steps == 4
    assert lines(tmp_path / "whole" / "metrics.jsonl")[-1]["epoch"] == 1
    run_until(3, values("killed", 1))
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "killed")] == ["step-000002"]
    assert train(values("killed", 1, resume="auto")).steps == 4
    assert_same_run(tmp_path / "killed", tmp_path / "whole", 4)
    written = load_recipe(tmp_path / "killed" / "config.yaml")
    assert (written["max_steps"], written["num_train_epochs"]) == (4, None)
    assert resolve(written).config.max_steps == 4
    capsys.readouterr()
    train(values("killed", 1, resume="auto"))
    assert "this run is complete; to continue it, set a larger --num-train-epochs" in capsys.readouterr().out
    assert train(values("killed", 1.5, resume="auto")).steps == 6
    assert "changed since the run was last started: max_steps: 4 -> 6" in capsys.readouterr().out


def test_check_shows_the_steps_and_their_source(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path, model_dir)
    path.write_text(path.read_text().replace("max_steps: 4", "num_train_epochs: 0.5"))
    assert cli.run(["check", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["values"]["max_steps"] == [2, "num_train_epochs"]
    assert report["stages"][0]["steps"] == 2
    assert report["stages"][0]["passes over the prompts"] == 0.5
    note = "the learning rate never reaches its value: optim.warmup_steps 2 is not below max_steps 2"
    assert note not in report["notes"]
    assert cli.run(["check", str(path), "--json", "--optim.warmup-steps", "2"]) == 0
    assert note in json.loads(capsys.readouterr().out)["notes"]


def test_reward_functions_are_told_the_steps(model_dir: Path, tmp_path: Path) -> None:
    """Also in the calls before the first step; with stages, their sum."""
    told: set[int] = set()

    def f(completions: list[str], trainer_state: Any) -> list[float]:
        told.add(trainer_state.max_steps)
        return [float(len(c)) for c in completions]

    stages = [{"method": "sft", "num_train_epochs": 0.5}, {"method": "grpo", "num_train_epochs": 0.25}]
    values = recipe(model_dir, tmp_path / "run", stages=stages)
    assert train(values, reward_functions=[f]).steps == 2
    assert told == {2}


def test_epochs_of_no_rows_are_refused_for_the_rows(model_dir: Path) -> None:
    rows = letter_rows(demonstrated=())
    with pytest.raises(uniapl.UsageError, match="method 'sft' needs demonstrations"):
        steps(model_dir, rows, method="sft", num_train_epochs=1)
