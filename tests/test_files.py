"""Files that are written completely or not at all, and logs that are cut back without being read whole."""

import errno
import json
import mmap
import os
from pathlib import Path
from typing import Any

import pytest

from uniapl.errors import UsageError
from uniapl.files import JsonlLog, write_text


def log_of(path: Path, steps: list[int]) -> Path:
    path.write_text("".join(json.dumps({"step": step, "text": f"é {step}"}) + "\n" for step in steps))
    return path


def test_a_replaced_file_is_on_the_disk_before_its_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The contents, then the name, then the directory; a power failure leaves the old file or the new one."""
    calls: list[tuple[str, str]] = []
    synced, replaced = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        calls.append(("sync", "directory" if path == tmp_path else path.read_text()))
        synced(descriptor)

    def replace(source: Path, target: Path) -> None:
        calls.append(("replace", Path(target).name))
        replaced(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_text(tmp_path / "a.json", "new")
    assert calls == [("sync", "new"), ("replace", "a.json"), ("sync", "directory")]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_file_that_cannot_be_replaced_is_as_it_was(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, full)
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [left.name for left in tmp_path.iterdir()] == ["a.json"]


def test_names_that_differ_only_in_their_suffix_and_links(tmp_path: Path) -> None:
    (tmp_path / "big disk").mkdir()
    (tmp_path / "a.json").symlink_to(tmp_path / "big disk" / "a.json")
    for name in ("a.json", "a.html"):
        write_text(tmp_path / name, name)
    assert (tmp_path / "big disk" / "a.json").read_text() == "a.json"
    assert (tmp_path / "a.json").is_symlink()
    assert (tmp_path / "a.html").read_text() == "a.html"


def test_a_file_system_that_cannot_sync_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new"


@pytest.mark.parametrize(
    ("steps", "last_step", "kept"),
    [
        ([1, 1, 2, 2, 3, 3], 2, 4),
        ([1, 2, 3], 3, 3),
        ([1, 2, 3], 9, 3),
        ([1, 2, 3], 0, 0),
        ([2, 5, 9], 6, 2),
        ([], 3, 0),
    ],
)
@pytest.mark.parametrize("end", ["", '{"step": 99, "text": "cut', "\n", "\n\n"])
def test_a_log_is_cut_back_to_a_step(
    steps: list[int], last_step: int, kept: int, end: str, tmp_path: Path
) -> None:
    path = log_of(tmp_path / "completions.jsonl", steps)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_text(path.read_text() + end)
    log = JsonlLog(path, last_step=last_step)
    assert path.read_bytes() == b"".join(lines[:kept])
    assert [record["step"] for record in log.tail(2)] == steps[:kept][-2:]
    log.write([{"step": last_step + 1}])
    assert path.read_bytes() == b"".join(lines[:kept]) + b'{"step": %d}\n' % (last_step + 1)


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file of 200 MB with three lines at its end: nothing before them is read."""
    path = log_of(tmp_path / "completions.jsonl", [])
    with path.open("ab") as file:
        file.truncate(200_000_000)
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + b"".join(b'{"step": %d}\n' % step for step in (7, 8, 9)))
    read: list[slice] = []

    class Counted(mmap.mmap):
        def __getitem__(self, part: Any) -> Any:
            read.append(part)
            return super().__getitem__(part)

    monkeypatch.setattr(mmap, "mmap", Counted)
    log = JsonlLog(path, last_step=8)
    assert log.tail(2) == [{"step": 7}, {"step": 8}]
    assert path.stat().st_size == 200_000_001 + 2 * len('{"step": 7}\n')
    assert sum(part.stop - part.start for part in read) < 100
    before = path.stat()
    JsonlLog(path, last_step=8)
    assert path.stat().st_mtime_ns == before.st_mtime_ns, "nothing to drop: the file is not written"


def test_a_damaged_line_near_the_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnull\n{"step": 3}\n')
    with pytest.raises(UsageError, match="damaged line; delete it to resume the run: null"):
        JsonlLog(path, last_step=2)
    log = JsonlLog(path, last_step=3)
    with pytest.raises(UsageError, match="damaged line; delete it to resume the run: null"):
        log.tail(5)
    assert log.tail(1) == [{"step": 3}]
