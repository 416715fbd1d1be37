"""Run directories: many starts at once, symbolic links, and a working directory that changes."""

import os
import threading
import time
from pathlib import Path

import pytest

import uniapl
from support.runs import evaluated, has_letter, lines, recipe, run_until, timeless, train
from uniapl.training.checkpoint import directory as checkpoint
from uniapl.training.checkpoint.disk import exclusive


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_of_many_starts_at_once_gets_the_directory(tmp_path: Path) -> None:
    """Also while refused runs delete the directory that they created."""
    run, inside, most = tmp_path / "runs" / "x", 0, 0
    refusals: list[str] = []

    def start() -> None:
        nonlocal inside, most
        for _ in range(30):
            try:
                with exclusive(run):
                    inside += 1
                    most = max(most, inside)
                    time.sleep(0.001)  # so that the others are refused
                    (run / "config.yaml").touch()
                    (run / "config.yaml").unlink()
                    inside -= 1
            except uniapl.UsageError as error:
                refusals.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert refusals
    assert all(message.startswith("another run is using output_dir") for message in refusals)


@pytest.mark.parametrize("exists", [True, False])
def test_a_refused_run_leaves_what_was_there(exists: bool, tmp_path: Path) -> None:
    """An empty directory that the user has made is kept; the directories that the run made are deleted."""
    run = tmp_path / "runs" / "x"
    if exists:
        run.mkdir(parents=True)
    with pytest.raises(uniapl.UsageError, match="the reason"), exclusive(run):
        raise uniapl.UsageError("the reason")
    assert [path.name for path in tmp_path.rglob("*")] == (["runs", "x"] if exists else [])


def test_directories_behind_links(model_dir: Path, tmp_path: Path) -> None:
    """A run is written, resumed and replaced behind links, which stay."""
    for name in ("run there", "checkpoints there"):
        (tmp_path / name).mkdir()
    run = tmp_path / "run"
    run.symlink_to(tmp_path / "run there")
    (run / "checkpoints").symlink_to(tmp_path / "checkpoints there")
    run_until(3, recipe(model_dir, run, overwrite=True))
    train(recipe(model_dir, run, resume="auto"))
    train(recipe(model_dir, tmp_path / "plain"))
    assert names(tmp_path / "checkpoints there") == ["step-000002", "step-000004"]
    ours, theirs = (timeless(lines(path / "metrics.jsonl")) for path in (run, tmp_path / "plain"))
    assert ours == theirs
    (run / "final").rename(tmp_path / "final there")
    (run / "final").symlink_to(tmp_path / "final there")
    train(recipe(model_dir, run, max_steps=1, overwrite=True))
    assert names(tmp_path / "checkpoints there") == ["step-000001"]
    assert run.is_symlink()
    assert (run / "checkpoints").is_symlink()
    assert (run / "final" / "model.safetensors").is_file()
    assert not [path for path in (tmp_path / "run there").iterdir() if path.name.startswith(".incomplete")]


def test_a_reward_that_changes_the_working_directory(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole run, with two stages, is in the directory that output_dir named at its start."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def wandering(completions: list[str], letter: list[str]) -> list[float]:
        os.chdir(tmp_path / "elsewhere")
        return has_letter(completions, letter)

    stages = [{"method": "grpo", "max_steps": 1}, {"method": "uniapl", "max_steps": 2}]
    values = recipe(model_dir, Path("runs/x"), stages=stages, save_steps=1, **evaluated(tmp_path))
    values["model"]["model_name_or_path"] = str(model_dir)
    result = train(values, reward_functions=[wandering])
    run = tmp_path / "runs" / "x"
    assert result.final_dir == run / "final"
    assert not names(tmp_path / "elsewhere")
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(run)] == [2, 3]
    assert [record["step"] for record in lines(run / "metrics.jsonl")] == [1, 2, 3]
    assert {"config.yaml", "final", "report.html", "stages"} <= set(names(run))
    # Resumed from the middle of the second stage, by a relative path.
    monkeypatch.chdir(tmp_path)
    first = timeless(lines(run / "metrics.jsonl"))
    train(values | {"resume": "runs/x/checkpoints/step-000002"}, reward_functions=[wandering])
    assert timeless(lines(run / "metrics.jsonl")) == first
    assert not names(tmp_path / "elsewhere")


def test_a_file_in_place_of_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    with (
        pytest.raises(uniapl.UsageError, match=r"rows.jsonl' cannot be written: it is a file"),
        exclusive(tmp_path / "rows.jsonl"),
    ):
        pass
    assert (tmp_path / "rows.jsonl").read_text() == "{}"
