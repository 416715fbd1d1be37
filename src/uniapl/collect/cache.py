"""Replies of the endpoint on disk, appended as they arrive: a killed process loses only pending requests."""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from uniapl.errors import UniAPLError, UsageError


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The endpoint's reply to one request, unprocessed."""

    content: str
    reasoning: str
    """The reasoning text, if the server returns it separately from the content."""
    finish_reason: str | None
    model: str | None
    """The model's name according to the endpoint."""
    url: str
    date: str
    prompt_tokens: int
    completion_tokens: int


class Cache:
    """The replies received so far, by the digest of their request (`Settings.key`)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replies: dict[str, Reply] = {}
        content = path.read_bytes() if path.exists() else b""
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            # A killed process left half a line, to which the next line must not be appended.
            os.truncate(path, len(complete))
        for number, line in enumerate(complete.splitlines(), start=1):
            try:
                fields = json.loads(line)
                key = fields.pop("key")
                self.replies[key] = Reply(**fields)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise UsageError(
                    f"{path}: line {number} is not a reply ({error!r:.80}); delete the line and repeat"
                ) from error

    def add(self, key: str, reply: Reply) -> None:
        """Keep a reply, in memory and on disk."""
        line = json.dumps({"key": key, **asdict(reply)}) + "\n"
        try:
            with self.path.open("ab") as file:
                file.write(line.encode())
        except OSError as error:
            raise UniAPLError(f"cannot write '{self.path}': {error}") from error
        self.replies[key] = reply


@contextlib.contextmanager
def open_cache(path: Path) -> Iterator[Cache]:
    """Open the cache at `path` for this process only.

    Raises:
        UsageError: Another process uses it, or it cannot be read or written.
    """
    lock = FileLock(f"{path}.lock", timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UsageError(f"another process is collecting into '{path}': wait until it ends") from None
    except OSError as error:
        raise UsageError(f"cannot write '{path}': {error}") from error
    try:
        try:
            cache = Cache(path)
        except OSError as error:
            raise UsageError(f"cannot read '{path}': {error}") from error
        yield cache
    finally:
        # Delete the file before the release: a process that waits for the lock checks that the file exists.
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()
