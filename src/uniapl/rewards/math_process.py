r"""math-verify in a child process, which can be ended.

A completion such as \boxed{9^{9^{9^9}}} makes SymPy compute without end. math-verify's own time limits need
the main thread, and in one operation on huge integers no thread of the process runs.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

from uniapl.errors import UsageError


class Comparison(NamedTuple):
    """The reward, and how the solution and the answer were read; the reward is an error if there is none."""

    reward: float | Exception | None
    gold: str
    answer: str


class MathProcess:
    """Starts the child with the first request, and again after it was ended. Requests are served in turn."""

    def __init__(self, *, seconds: float = 5.0) -> None:
        """Start nothing yet.

        Args:
            seconds: Processor time allowed for a request; an ordinary one takes 0.02 s.
        """
        self._seconds = seconds
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._pid = os.getpid()

    def compare(self, solution: str, completion: str | None = None) -> Comparison:
        """1 if the answer in a completion equals the solution, else 0; None if the solution is unparseable.

        An answer that is not evaluated within it counts as wrong, and such a solution as
        unparseable.

        Raises:
            UsageError: math-verify is not installed or cannot be started.
        """
        if os.getpid() != self._pid:
            self.__init__(seconds=self._seconds)  # a forked process has its own child
        with self._lock:
            child = self._running()
            assert child.stdin is not None
            assert child.stdout is not None
            line = ""
            try:
                child.stdin.write(json.dumps([solution, completion]) + "\n")
                child.stdin.flush()
                line = child.stdout.readline()
            except BrokenPipeError:
                pass
            except BaseException:  # Ctrl-C: the next request must not get this result
                child.kill()
                self._end()
                raise
            if line:
                result = json.loads(line)
                if isinstance(result, str):
                    return Comparison(RuntimeError(result), "[error]", "[error]")
                return Comparison(*result)
            code = self._end()
        if code == -signal.SIGPROF:
            if completion is None:
                return Comparison(None, "[unparseable]", "[skipped]")
            return Comparison(0.0, solution, "[timed out]")
        error = RuntimeError(f"math-verify's process ended with exit code {code}")
        return Comparison(error, "[error]", "[error]")

    def _running(self) -> "subprocess.Popen[str]":
        if self._child is not None:
            return self._child
        if importlib.util.find_spec("math_verify") is None:
            raise UsageError(
                "accuracy_reward and reasoning_accuracy_reward need math-verify: pip install 'uniapl[math]'"
            )
        # -P: the directory of the file holds modules with names of the standard library's.
        program = str(Path(__file__).with_name("math_worker.py"))
        command = [sys.executable, "-P", program, str(self._seconds)]
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C ends the run only after its step, which needs rewards
        )
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if line != "null\n":
            self._end()
            raise UsageError(f"math-verify cannot be started: {line.strip() or 'the process has ended'}")
        return self._child

    def _end(self) -> int:
        """End the child; its exit code, which is negative after a signal."""
        child, self._child = self._child, None
        assert child is not None
        with contextlib.suppress(OSError), child:
            pass  # leaving the context closes the pipes and waits
        return child.returncode
