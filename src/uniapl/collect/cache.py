"""Answers on disk, as they come in: a process that dies loses only what was on its way."""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from uniapl.errors import UniAPLError, UsageError


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the endpoint said to one request, before anything is cut or dropped."""

    content: str
    reasoning: str
    """Where the server keeps thoughts apart from the answer."""
    finish_reason: str | None
    model: str | None
    """As the endpoint names it."""
    url: str
    date: str
    prompt_tokens: int
    completion_tokens: int


class Cache:
    """The answers that there are, by the digest of what was asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, Answer] = {}
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            # The half line of a process that was killed: the next one must not join it.
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                fields = json.loads(line)
                key = fields.pop("key")
                self.answers[key] = Answer(**fields)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                said = f"{path}: line {number} is no answer: {error!r:.80}"
                raise UsageError(f"{said}; delete the line, and it is asked again") from error

    def keep(self, key: str, answer: Answer) -> None:
        """Add an answer, on disk too.

        Raises:
            UniAPLError: The disk does not take it.
        """
        line = json.dumps({"key": key, **asdict(answer)}) + "\n"
        try:
            with self.path.open("ab") as file:
                file.write(line.encode())
        except OSError as error:
            raise UniAPLError(f"'{self.path}' cannot be written: {error}") from error
        self.answers[key] = answer


@contextlib.contextmanager
def open_cache(path: Path) -> Iterator[Cache]:
    """The cache at `path`, for this process alone.

    Raises:
        UsageError: Another process is at work there, or it cannot be read or written.
    """
    lock = FileLock(f"{path}.lock", timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UsageError(f"another process is collecting into '{path}': wait for its end") from None
    except OSError as error:
        raise UsageError(f"'{path}' cannot be written: {error}") from error
    try:
        try:
            cache = Cache(path)
        except OSError as error:
            raise UsageError(f"'{path}' cannot be read: {error}") from error
        yield cache
    finally:
        # Before the release: whoever waits for the lock looks whether its file is still there.
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()
