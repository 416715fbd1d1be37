"""Running verifier code that came with the data, in a jail that it cannot hurt anybody from.

A pool of long-lived workers, each a bare Python interpreter behind as many layers as the machine offers:

* bubblewrap (else `unshare`): namespaces of its own for processes, network, IPC and users; with bubblewrap a
  file system that holds the interpreter alone, read-only;
* landlock: nothing on the file system may be touched but the interpreter's own files, read-only;
* seccomp: a short list of system calls, among them none for processes, sockets, signals and writing files;
* rlimits: processor time, memory, file sizes, descriptors.

Without bubblewrap, and without seccomp and landlock together, nothing is run. Each job is a forked child in a
session of its own; it has one second, and only True or False is a verdict. Everything else (an exception, a
time-out, a result of another type) is a :class:`SandboxError`: no reward, never a 0. docs/decisions/0009 has
the reasons.
"""

import atexit
import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from uniapl.errors import UsageError
from uniapl.rewards.sandbox.layers import (
    WRAPPERS,
    readable_directories,
    seccomp_program,
    worker_command,
    wrapper_command,
)

START_SECONDS = 20.0
"""How long a worker may take to start on a busy machine."""
GRACE_SECONDS = 5.0
"""How long after a job's own time a worker may take to say so, before it is taken for dead."""
CACHED_VERDICTS = 100_000


class SandboxError(Exception):
    """A job gave no verdict; the text says why."""


@dataclass(frozen=True)
class Job:
    """One function and one text.

    Example:
        Job(source="def evaluate(response): return 'e' not in response", text="A short word")
    """

    source: str
    text: str
    function: str = "evaluate"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a job may use."""

    seconds: float = 1.0
    """Wall clock."""
    memory: int = 512 * 2**20
    """Bytes of address space."""


@dataclass(frozen=True, kw_only=True)
class Layers:
    """What to build the jail from."""

    wrapper: str
    landlock: bool = True
    seccomp: str | None = field(default_factory=seccomp_program)


class Sandbox:
    """The pool. Close it, or leave that to the end of the process."""

    def __init__(
        self, *, workers: int | None = None, limits: Limits | None = None, layers: Layers | None = None
    ) -> None:
        """Start the workers, in the best jail that there is, or in the one that is asked for.

        Raises:
            UsageError: It would not be a jail: neither bubblewrap nor seccomp with landlock can be set up.
        """
        self.limits = limits or Limits()
        self._layers, first = _first_worker(layers, self.limits)
        self.layers: tuple[str, ...] = first.layers
        """What is in force, by name."""
        self.pid_namespace = first.pid_namespace
        count = workers or min(4, os.cpu_count() or 1)
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        self._idle.put(first)
        for _ in range(count - 1):
            self._idle.put(None)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="sandbox")
        self._verdicts: dict[Job, bool] = {}
        self._lock = threading.Lock()
        atexit.register(self.close)

    def run(self, jobs: Sequence[Job]) -> list[bool | SandboxError]:
        """The verdict of each job, in order, or why there is none; verdicts are remembered."""
        if len(self._verdicts) > CACHED_VERDICTS:
            self._verdicts.clear()
        unknown = [job for job in dict.fromkeys(jobs) if job not in self._verdicts]
        found = dict(zip(unknown, self._threads.map(self._run_one, unknown), strict=True))
        with self._lock:
            self._verdicts |= {job: value for job, value in found.items() if isinstance(value, bool)}
            return [self._verdicts[job] if job in self._verdicts else found[job] for job in jobs]

    def close(self) -> None:
        """End the workers."""
        atexit.unregister(self.close)
        self._threads.shutdown()
        while not self._idle.empty():
            worker = self._idle.get()
            if worker is not None:
                worker.close()

    def _run_one(self, job: Job) -> bool | SandboxError:
        worker = self._idle.get()
        try:
            worker = worker or _Worker(self._layers, self.limits)
            return worker.ask(job)
        except SandboxError as error:
            # The worker itself is gone or mute; the next job gets a new one.
            if worker is not None:
                worker.close()
            worker = None
            return error
        finally:
            self._idle.put(worker)


class _Worker:
    """One jailed interpreter and the pipes to it."""

    def __init__(self, layers: Layers, limits: Limits) -> None:
        wrapper = wrapper_command(layers.wrapper)
        if wrapper is None:
            raise SandboxError(f"{layers.wrapper} is not installed")
        self._seconds = limits.seconds
        try:
            self._process = subprocess.Popen(
                [*wrapper, *worker_command()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "PYTHONHASHSEED": "0"},
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxError(f"cannot be started: {error}") from error
        settings = {
            "seconds": limits.seconds,
            "memory": limits.memory,
            "landlock": layers.landlock,
            "readable": readable_directories(),
            "seccomp": layers.seccomp,
            "caller_pid_namespace": _pid_namespace(),
        }
        try:
            said = self._exchange(settings, START_SECONDS)
        except SandboxError as error:
            self._process.kill()
            assert self._process.stderr is not None
            complaint = self._process.stderr.read().decode(errors="replace").strip().splitlines()
            self.close()
            raise SandboxError(complaint[-1] if complaint else str(error)) from error
        wrappers = () if layers.wrapper == "none" else (layers.wrapper,)
        self.layers = (*wrappers, *said["layers"])
        self.pid_namespace: str = said["pid_namespace"]

    def ask(self, job: Job) -> bool | SandboxError:
        """The job's verdict. Raises SandboxError where the worker itself has failed."""
        question = {"source": job.source, "text": job.text, "function": job.function}
        answer = self._exchange(question, self._seconds + GRACE_SECONDS)
        value = answer.get("value")
        return value if isinstance(value, bool) else SandboxError(str(answer.get("error", "no verdict")))

    def close(self) -> None:
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._process.wait()

    def _exchange(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], seconds)[0]:
                raise SandboxError("the worker gave no answer")
            return json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:
            raise SandboxError("the worker has ended") from error


def _first_worker(layers: Layers | None, limits: Limits) -> tuple[Layers, _Worker]:
    """A worker in the best jail that can be set up."""
    tried: list[str] = []
    for candidate in [layers] if layers else [Layers(wrapper=wrapper) for wrapper in WRAPPERS]:
        try:
            worker = _Worker(candidate, limits)
        except SandboxError as error:
            tried.append(f"{candidate.wrapper}: {error}")
            continue
        if "bubblewrap" in worker.layers or {"seccomp", "landlock"} <= set(worker.layers):
            return candidate, worker
        tried.append(f"only {', '.join(worker.layers)}")
        worker.close()
    raise UsageError(
        "code verifiers cannot be run: no jail could be set up "
        f"({'; '.join(tried)}). On Linux, install bubblewrap, or 'uniapl[sandbox]' (seccomp) on a kernel "
        "with landlock"
    )


def _pid_namespace() -> str:
    return os.readlink("/proc/self/ns/pid") if sys.platform == "linux" else ""
