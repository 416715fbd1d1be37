"""Disks that are full or read-only: one message, nothing that was whole is lost, and the run goes on later.

Each run has a file system of its own, in memory, which this process alone sees.
"""

import contextlib
import ctypes
import functools
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torture import children
from torture.differences import differences, whole_checkpoints, wrong_checkpoints
from torture.setting import LAST_STEP, Setting, log_of, steps_done
from uniapl.training.checkpoint import directory as checkpoint
from uniapl.training.checkpoint.disk import LOCK

NEW_MOUNTS, NEW_USERS = 0x00020000, 0x10000000
"""Of clone(2)."""
ROOM = "64m"
"""Enough for any run."""


@dataclass(kw_only=True)
class Shortage:
    """A run whose file system failed it, and which went on when it was mended."""

    case: str
    code: int | None = None
    at_step: int = 0
    message: str = ""
    complaints: list[str] = field(default_factory=list)


@functools.cache
def namespace() -> str | None:
    """Give this process mounts of its own; why not, if it cannot have them."""
    own = os.getuid() != 0
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_MOUNTS | (NEW_USERS if own else 0)):
        return f"no mount namespace: {os.strerror(ctypes.get_errno())}"
    if own:
        # Root of the namespace, as which it may mount.
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    private = _mount("--make-rprivate", "/")
    return None if private is None else f"mounts cannot be made private: {private}"


def cases(setting: Setting) -> list[tuple[str, int]]:
    """(what happens, how much of it or when)."""
    end = sum(file.stat().st_blocks * 512 for file in setting.reference.rglob("*"))
    # While a run saves it holds one checkpoint more than at its end.
    sizes = [4096, *(round(end * share) for share in (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.1, 1.3))]
    steps = [1, 8, 17, 30, LAST_STEP - 1]
    return [
        *(("small disk", size) for size in sizes),
        *(("disk filled after step", step) for step in steps),
        *(("read-only after step", step) for step in (0, *steps)),
    ]


def starve(setting: Setting, what: str, amount: int) -> Shortage:
    """Run on a disk that is or becomes unfit, then mend it and go on."""
    found = Shortage(case=f"{what} {amount}")
    disk = setting.directory / f"{what} {amount}".replace(" ", "-")
    log, run, filler = log_of(disk), disk / "run", disk / "filler"
    meanwhile: Callable[[float], bool] | None = None
    size = str(amount) if what == "small disk" else ROOM
    with _tmpfs(disk, size):
        if what == "read-only after step" and amount:
            # The run's lock is open for writing all the time: on this disk it would keep it writable.
            run.mkdir()
            elsewhere = disk.with_suffix(".lock")
            for lock in (elsewhere, run / LOCK):
                lock.touch()
            _must(_mount("--bind", str(elsewhere), str(run / LOCK)))
        if what == "read-only after step" and not amount:
            _must(_mount("-o", "remount,ro", str(disk)))
        elif what != "small disk":
            # A file that is being written to keeps the disk writable: then it is tried again.
            act = functools.partial(_fill, filler) if "filled" in what else functools.partial(_lock, disk)
            meanwhile = lambda _: steps_done(run) >= amount and act()  # noqa: E731
        found.code = children.wait(children.start(setting.arguments(run), log), meanwhile=meanwhile)
        found.at_step = steps_done(run)
        found.complaints += _look(found, run, log.read_text())
        found.complaints += wrong_checkpoints(run, setting.every)
        _must(_mount("-o", f"remount,rw,size={ROOM}", str(disk)))
        filler.unlink(missing_ok=True)
        code = children.run(setting.arguments(run), log)
        if code:
            found.complaints.append(f"going on ended with {code}")
        else:
            found.complaints += differences(run, setting.reference)
    return found


def _look(found: Shortage, run: Path, said: str) -> list[str]:
    """What is wrong with how a run ended."""
    complaints = ["a traceback"] if "Traceback" in said else []
    if found.code == 0:
        # It had all the space that it needed.
        return complaints
    begun = (run / "metrics.jsonl").exists()
    if found.code != (1 if begun else 2):
        complaints.append(f"exit code {found.code} after step {found.at_step}")
    messages = [line for line in said.splitlines() if line.startswith("error: ")]
    found.message = "; ".join(messages)
    if len(messages) != 1 or str(run) not in messages[0]:
        complaints.append(f"not one message that names the run: {messages}")
    existing = checkpoint.checkpoints(run)
    complaints += [f"{path.name} is not whole" for path in existing if path not in whole_checkpoints(run)]
    if existing and not ("--resume auto" in found.message and str(existing[-1]) in found.message):
        complaints.append("does not say from where the run can go on")
    return complaints


@contextlib.contextmanager
def _tmpfs(path: Path, size: str) -> Iterator[None]:
    path.mkdir()
    _must(_mount("-t", "tmpfs", "-o", f"size={size}", "none", str(path)))
    try:
        yield
    finally:
        subprocess.run(["umount", "--recursive", str(path)], check=True)


def _fill(filler: Path) -> bool:
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return True


def _lock(disk: Path) -> bool:
    return _mount("-o", "remount,ro", str(disk)) is None


def _mount(*arguments: str) -> str | None:
    """What `mount` says against it; None if it did it."""
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else None


def _must(complaint: str | None) -> None:
    assert complaint is None, complaint
