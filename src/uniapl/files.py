"""Files that are written completely or not at all, and logs of one JSON object per line."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from uniapl.errors import UsageError


def write_text(path: Path, text: str) -> None:
    """All or nothing: a file that is there is whole."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


class JsonlLog:
    """A file of one JSON object per line, each with a "step".

    Opened at the step a run goes on from, it drops the lines of later steps, which will be written again.
    One process writes; in the others it is not enabled.
    """

    def __init__(self, path: Path, *, last_step: int, enabled: bool = True) -> None:
        self.path, self.enabled = path, enabled
        if not enabled:
            return
        kept = [line for line in _whole_lines(path) if _step_of(path, line) <= last_step]
        write_text(path, "".join(f"{line}\n" for line in kept))

    def tail(self, count: int) -> list[dict[str, Any]]:
        """The last `count` records, oldest first."""
        return [json.loads(line) for line in _whole_lines(self.path)[-count:]] if self.enabled else []

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append; a number that is not finite becomes null, which every JSON reader understands."""
        if not self.enabled:
            return
        lines = [json_line(record) for record in records]
        try:
            # Half a surrogate pair, which JSON can hold and UTF-8 cannot, is written as its escape.
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("".join(f"{line}\n" for line in lines))
        except OSError as error:
            # A write that fails, unlike an open, does not know of what.
            error.filename = str(self.path)
            raise


def json_line(record: Mapping[str, Any]) -> str:
    """As strict JSON; a number that is not finite becomes null."""
    return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False, default=repr)


def _whole_lines(path: Path) -> list[str]:
    """Lines that end; a process that was killed may have left half of one."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if line]


def _step_of(path: Path, line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(f"{path}: a line is damaged; delete it, and the run goes on: {line:.80}") from error


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
