"""Runs in processes of their own, forked from one that has everything heavy loaded: a start takes no time."""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from uniapl import cli

PATIENCE = 300.0
"""Seconds after which a child is said to hang."""


def start(
    arguments: Sequence[str],
    log: Path,
    *,
    arm: Callable[[], None] | None = None,
    as_command: bool = False,
) -> int:
    """Start `uniapl` with these arguments; what it says is appended to `log`.

    Args:
        arm: Called in the child before anything else.
        as_command: By `python -m uniapl.cli`, as a user starts it, instead of in a fork.

    Returns:
        The process id.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with log.open("a") as said:
            for stream in (1, 2):
                os.dup2(said.fileno(), stream)
        if as_command:
            os.execv(sys.executable, [sys.executable, "-m", "uniapl.cli", *arguments])
        if arm is not None:
            arm()
        code = _main(arguments)
    except KeyboardInterrupt:
        # Before or behind the program, where it is Python's to answer.
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(pid: int, *, meanwhile: Callable[[float], bool] | None = None) -> int:
    """Wait for a child's end; its return code, as `subprocess` has them.

    Args:
        meanwhile: Called with the seconds that have passed, again and again until it has done what it wanted.

    Raises:
        TimeoutError: It hangs; it was killed.
    """
    began = time.monotonic()
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        elapsed = time.monotonic() - began
        if meanwhile is not None and meanwhile(elapsed):
            meanwhile = None
        if elapsed > PATIENCE:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"process {pid} did not end in {PATIENCE:.0f} s")
        time.sleep(0.002)


def run(arguments: Sequence[str], log: Path) -> int:
    """Run `uniapl` with these arguments to its end; the return code."""
    return wait(start(arguments, log))


def _main(arguments: Sequence[str]) -> int:
    try:
        cli.main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    raise AssertionError("the command line ends with its exit code")
