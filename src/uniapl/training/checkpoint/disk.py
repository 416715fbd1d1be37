"""The disk of a run: a lock on its directory, and free space for its checkpoints."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from uniapl.errors import UsageError

LOCK = ".lock"
LOCK_ATTEMPTS = 100
"""Attempts to lock a directory that other runs create and delete at the same time."""
RESERVE = 2**20
"""Bytes left free next to a checkpoint, for the log lines until the next one. Our choice."""


@contextlib.contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Lock a run directory; the operating system releases the lock if the process dies.

    Raises:
        UsageError: Another run uses the directory, or it cannot be written.
    """
    lock = FileLock(run_dir / LOCK, timeout=0)
    created: list[Path] = []
    try:
        created += [path for path in (run_dir, *run_dir.parents) if not path.exists()]
        _acquire(lock, run_dir)
    except Timeout:
        raise UsageError(
            f"another run is using output_dir '{run_dir}': wait until it ends, or choose another --output-dir"
        ) from None
    except FileExistsError as error:
        raise UsageError(
            f"output_dir '{run_dir}' cannot be written: it is a file; choose another --output-dir"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: not a valid file name
        raise UsageError(f"output_dir {str(run_dir)!r} cannot be written: {error}") from error
    try:
        yield
    finally:
        # A run that was refused leaves nothing behind.
        with contextlib.suppress(OSError):
            if [path.name for path in run_dir.iterdir()] == [LOCK]:
                (run_dir / LOCK).unlink()
                for path in created:
                    path.rmdir()
        lock.release()


def _acquire(lock: FileLock, run_dir: Path) -> None:
    """Create the directory and lock it."""
    for attempt in range(LOCK_ATTEMPTS):
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            # Some file systems have no locks; runs on them are not protected.
            with contextlib.suppress(NotImplementedError):
                lock.acquire()
            return
        except (FileNotFoundError, FileExistsError):
            # A run that was refused deleted the directory in between; mkdir reports this as an existing file.
            if attempt + 1 == LOCK_ATTEMPTS or run_dir.is_file():
                raise


def check_available(run_dir: Path) -> None:
    """Refuse a run directory that :func:`exclusive` would refuse, without changing the disk.

    Raises:
        UsageError: Another run uses the directory, or it cannot be written.
    """
    try:
        if (run_dir / LOCK).exists():
            with exclusive(run_dir):
                return
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            run_dir.stat()  # finds names that are invalid or too long
        existing = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise NotADirectoryError(f"'{existing}' is not a directory")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(f"no permission to write in '{existing}'")
    except (OSError, ValueError) as error:  # ValueError: not a valid file name
        raise UsageError(f"output_dir {str(run_dir)!r} cannot be written: {error}") from error


def has_space(run_dir: Path, needed: int) -> bool:
    """Whether this many bytes fit."""
    return shutil.disk_usage(run_dir).free >= needed + RESERVE


def check_space(run_dir: Path, needed: int) -> None:
    """Refuse to start a run whose checkpoints and result, `needed` bytes, do not fit.

    Raises:
        UsageError: They do not fit.
    """
    if not has_space(run_dir, needed):
        raise UsageError(
            f"output_dir '{run_dir}' has {_free(run_dir)} free, but the run needs about "
            f"{format_bytes(needed)} for checkpoints and the result: free some space, lower "
            "save_total_limit, or choose another --output-dir"
        )


def require_space(run_dir: Path, needed: int) -> None:
    """Refuse to start a checkpoint that does not fit.

    Raises:
        OSError: It does not fit.
    """
    if not has_space(run_dir, needed):
        reason = f"no room for the next checkpoint: {_free(run_dir)} free, {format_bytes(needed)} needed"
        raise OSError(errno.ENOSPC, reason, str(run_dir))


def format_bytes(count: int) -> str:
    """A number of bytes with a binary unit.

    Example:
        >>> format_bytes(1536 * 2**20)
        '1.5 GiB'
    """
    unit, power = next((u, p) for u, p in (("GiB", 30), ("MiB", 20), ("KiB", 10)) if count >= 2**p or p == 10)
    return f"{count / 2**power:.1f} {unit}"


def _free(run_dir: Path) -> str:
    return format_bytes(shutil.disk_usage(run_dir).free)
