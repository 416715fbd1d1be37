"""Atomic, synced writes and JSON Lines logs."""

import contextlib
import errno
import itertools
import json
import math
import mmap
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from uniapl.errors import UsageError

TEMPORARY_PREFIX = ".incomplete-"
"""Begins the name of a file or directory until it is complete. A killed process may leave such a name."""


def expand_home(text: str) -> str:
    """Replace `~` at the start of a path by the home directory, also after `--flag=` and `name=`.

    Raises:
        ValueError: The text begins with `~name/`, and there is no user with this name.

    Example:
        `held_out=~/rows.jsonl` becomes `held_out=/home/ann/rows.jsonl`.
    """
    match = re.match(r"([\w.-]+=)?(~.*)", text, re.DOTALL)
    if match is None:
        return text
    path = os.path.expanduser(match[2])
    if path.startswith("~") and "/" in path:
        raise ValueError(f"'{path}': no such user; write ./{path} for a path that begins with '~'")
    return (match[1] or "") + path


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: it is replaced completely or not at all, also if the machine loses power.

    The target of a symbolic link is replaced, not the link.

    Raises:
        OSError: The error names `path`.
    """
    path = path.resolve()
    # No other process writes to a name of its own.
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{secrets.token_hex(4)}")
    try:
        temporary.write_text(text, encoding="utf-8")
        # Without this, some file systems rename first: after a power failure the file would be empty.
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        raise


def sync(path: Path) -> None:
    """Wait until a file's contents, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a directory.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """:func:`sync` for a directory and everything in it."""
    for path in [*directory.rglob("*"), directory]:
        sync(path)


class JsonlLog:
    """A log of one JSON object per line, each with a "step" that is not lower than the one before.

    Opening it drops the lines after `last_step`, which a resumed run writes again. The file is read from its
    end, and only as far as necessary: it may be larger than the memory. Only one process writes; `enabled` is
    false in the others.

    Raises:
        UsageError: One of the last lines is damaged.
    """

    def __init__(self, path: Path, *, last_step: int) -> None:
        self.path, self.enabled = path, True
        if not path.exists():
            path.touch()
        with _lines_from_end(path) as found:
            kept = (end for line, end in found if line and int(_record(path, line)["step"]) <= last_step)
            end = next(kept, 0)
        if end != path.stat().st_size:
            with path.open("ab") as file:
                file.truncate(end)
            self.sync()

    def tail(self, count: int) -> list[dict[str, Any]]:
        """The last `count` records, oldest first.

        Raises:
            UsageError: One of them is damaged.
        """
        with _lines_from_end(self.path) as found:
            last = (_record(self.path, line) for line, _ in found if line)
            return [*itertools.islice(last, count)][::-1]

    def sync(self) -> None:
        """Wait until all records are on the disk."""
        sync(self.path)

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append records; a non-finite number becomes null."""
        if not self.enabled:
            return
        text = "".join(f"{json_line(record)}\n" for record in records)
        try:
            # A lone surrogate, which JSON allows and UTF-8 does not, is written as its escape sequence.
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError as error:
            # The error of a failed write, unlike that of a failed open, does not name the file.
            error.filename = str(self.path)
            raise


def json_line(record: Mapping[str, Any]) -> str:
    """Strict JSON on one line; a non-finite number becomes null."""
    return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False, default=repr)


@contextlib.contextmanager
def _lines_from_end(path: Path) -> Iterator[Iterator[tuple[str, int]]]:
    """The complete lines, the last one first, each with the offset of its end in bytes.

    A killed process may have written only a part of the last line; that part is skipped.
    """
    if not path.stat().st_size:
        yield iter(())
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:

        def lines() -> Iterator[tuple[str, int]]:
            end = content.rfind(b"\n") + 1
            while end:
                start = content.rfind(b"\n", 0, end - 1) + 1
                yield content[start : end - 1].decode(errors="replace"), end
                end = start

        yield lines()


def _record(path: Path, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        int(record["step"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(f"{path}: damaged line; delete it to resume the run: {line:.80}") from error
    return record


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
