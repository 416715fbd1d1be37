"""Runs that are killed at awkward moments, and disks that fail: `make torture` in small, at chosen places."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
from transformers import PreTrainedTokenizerBase

from support.runs import Killed, lines, recipe, timeless, train, write_recipe
from uniapl import cli, files
from uniapl.files import JsonlLog
from uniapl.training.checkpoint import directory as checkpoint

FULL = "No space left on device (os error 28)"


def failing(original: Callable[..., Any], error: BaseException, number: int) -> Callable[..., Any]:
    """The function, but its n-th call raises."""
    calls = 0

    def replaced(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise error
        return original(*arguments, **settings)

    return replaced


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill_with(content: str) -> Callable[[Path], None]:
    def fill(directory: Path) -> None:
        (directory / "a.txt").write_text(content)

    return fill


@pytest.mark.parametrize(
    ("owner", "function", "error", "number"),
    [
        # Of the policy's optimizer, the discriminator and its optimizer: in the second save.
        (checkpoint, "save_file", safetensors.SafetensorError(f"I/O error: {FULL}"), 6),
        # tokenizers raises nothing more specific.
        (PreTrainedTokenizerBase, "save_pretrained", Exception(FULL), 2),
        (os, "rename", OSError(errno.EROFS, "Read-only file system"), 2),
    ],
    ids=["tensors", "tokenizer", "rename"],
)
def test_a_disk_that_fails_in_the_run_ends_it_with_one_message(
    owner: Any,
    function: str,
    error: Exception,
    number: int,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_recipe(tmp_path, model_dir)
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert cli.run(["train", str(path), "--output-dir", str(whole)]) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(owner, function, failing(getattr(owner, function), error, number))
        assert cli.run(["train", str(path)]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"error: the run in '{run}' failed: [Errno ")
    first, second = (checkpoint.checkpoint_path(run, step) for step in (2, 4))
    assert f"'{second}'. Fix the cause and continue from {first} with --resume auto\n" in message
    assert names(run / "checkpoints") == [first.name], "nothing half is left"
    assert cli.run(["train", str(path), "--resume", "auto"]) == 0
    ours, theirs = (timeless(lines(directory / "metrics.jsonl")) for directory in (run, whole))
    assert ours == theirs


def test_a_disk_that_fails_before_the_first_save_or_the_first_step(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path, model_dir)
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(os.fsync, full, 1))
        assert cli.run(["train", str(path)]) == 2
    assert f"'{tmp_path / 'run'}' cannot be written: [Errno 28]" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sync_tree", failing(checkpoint.sync_tree, full, 1))
        assert cli.run(["train", str(path), "--overwrite", "True"]) == 1
    assert "Fix the cause and start again; no checkpoint was saved" in capsys.readouterr().err
    assert cli.run(["train", str(path), "--resume", "auto"]) == 0
    # A finished run writes no config.yaml, but cuts its logs back.
    with (tmp_path / "run" / "metrics.jsonl").open("a") as log:
        log.write("half a li")
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", failing(files.sync, full, 1))
        assert cli.run(["train", str(path), "--resume", "auto"]) == 2
    assert f"error: output_dir '{tmp_path / 'run'}' cannot be written: [Errno 28]" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which is Linux's")
def test_a_log_line_that_cannot_be_written_names_its_file(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path / "metrics.jsonl", last_step=0)
    log.path = Path("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        log.write([{"step": 1}])


def test_what_the_next_start_reads_is_whole_whenever_this_one_dies(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = recipe(model_dir, tmp_path / "run", max_steps=2)
    train(values)
    before = (tmp_path / "run" / "config.yaml").read_text()
    written = Path.write_text

    def die_halfway(path: Path, text: str, **settings: Any) -> int:
        written(path, text[: len(text) // 2], **settings)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", die_halfway)
        with pytest.raises(Killed):
            train(values | {"resume": "auto", "max_steps": 4})
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    train(values | {"resume": "auto", "max_steps": 4})
    assert not [name for name in names(tmp_path / "run") if name.startswith(".incomplete")]


def test_a_deletion_that_dies_leaves_no_half_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (2, 4, 6):
        checkpoint.write_directory(checkpoint.checkpoint_path(tmp_path, step), fill_with(str(step)))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", failing(shutil.rmtree, Killed(), 1))
        with pytest.raises(Killed):
            checkpoint.prune(tmp_path, 2)
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [4, 6]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", failing(shutil.rmtree, Killed(), 1))
        with pytest.raises(Killed):
            checkpoint.forget_after(tmp_path, 4)
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [4]
    assert len(names(tmp_path / "checkpoints")) == 3
    checkpoint.sweep(tmp_path)
    assert names(tmp_path / "checkpoints") == ["step-000004"]


def test_a_start_does_what_the_run_before_was_killed_at(model_dir: Path, tmp_path: Path) -> None:
    """Killed behind its last save, before older checkpoints were deleted: the run is finished already."""
    values = recipe(model_dir, tmp_path / "run", max_steps=6)
    train(values)
    saved = tmp_path / "run" / "checkpoints"
    shutil.copytree(saved / "step-000004", saved / "step-000002")
    for folder in (saved, tmp_path / "run", tmp_path / "run" / "stages"):
        (folder / ".incomplete-removed-x").mkdir(parents=True)
        (folder / ".incomplete-config.yaml-0a").touch()
    train(values | {"resume": "auto"})
    assert names(saved) == ["step-000004", "step-000006"]
    assert not list((tmp_path / "run").rglob(".incomplete-*"))


def test_a_replacement_that_dies_does_not_lead_back_to_what_it_was_to_replace(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = recipe(model_dir, tmp_path / "run", max_steps=2)
    train(values)
    other = values | {"overwrite": True, "seed": 7}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", failing(Path.unlink, Killed(), 1))
        with pytest.raises(Killed):
            train(other)
    train(other | {"resume": "auto", "overwrite": False})
    assert "starting from step 1" in capsys.readouterr().out


def test_a_directory_of_the_same_contents_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run that is started again and killed keeps its model at every moment."""
    final = tmp_path / "final"
    checkpoint.write_directory(final, fill_with("model"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing(Path.rename, Killed(), 1))
        checkpoint.write_directory(final, fill_with("model"))
    assert names(tmp_path) == ["final"]
    checkpoint.write_directory(final, fill_with("other"))
    assert (final / "a.txt").read_text() == "other"
    (final / "a.txt").write_text("spoilt")
    checkpoint.write_directory(final, fill_with("other"))
    assert (final / "a.txt").read_text() == "other", "damage is mended"
    assert names(tmp_path) == ["final"]


ENTRY = {"bytes": 1, "sha256": ""}


@pytest.mark.parametrize(
    "manifest",
    [[], *({"a.txt": entry} for entry in (3, None, {"sha256": ""}, {"bytes": 1})), {"a.txt": [ENTRY]}],
)
def test_a_manifest_of_another_shape_is_a_defect(manifest: Any, tmp_path: Path) -> None:
    checkpoint.write_directory(tmp_path / "model", fill_with("x"))
    (tmp_path / "model" / "manifest.json").write_text(json.dumps(manifest))
    assert len(checkpoint.defects(tmp_path / "model")) == 1


def test_a_file_that_cannot_be_read_is_a_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write_directory(tmp_path / "model", fill_with("x"))
    broken = OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(checkpoint, "_sha256", failing(checkpoint._sha256, broken, 1))
    assert checkpoint.defects(tmp_path / "model") == ["a.txt: [Errno 5] Input/output error"]
