"""Atomic writes and JSON Lines logs."""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from uniapl.errors import UsageError


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
    """Write a file atomically: it is replaced completely or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


class JsonlLog:
    """A log of one JSON object per line, each with a "step".

    Opening it drops the lines after `last_step`, which a resumed run writes again. Only one process writes.
    """

    def __init__(self, path: Path, *, last_step: int, enabled: bool = True) -> None:
        self.path, self.enabled = path, enabled
        if not enabled:
            return
        kept = [line for line in _complete_lines(path) if _step_of(path, line) <= last_step]
        write_text(path, "".join(f"{line}\n" for line in kept))

    def tail(self, count: int) -> list[dict[str, Any]]:
        """The last `count` records, oldest first."""
        return [json.loads(line) for line in _complete_lines(self.path)[-count:]] if self.enabled else []

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


def _complete_lines(path: Path) -> list[str]:
    """The lines that end with a newline; a killed process may have written only a part of the last one."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if line]


def _step_of(path: Path, line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(f"{path}: damaged line; delete it to resume the run: {line:.80}") from error


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
