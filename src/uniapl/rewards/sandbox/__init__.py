"""Runs verifier functions that come with the data in a jail.

A pool of long-lived workers, each a bare Python interpreter inside every layer that the machine offers:

* bubblewrap, else `unshare`: separate process, network, IPC and user namespaces; bubblewrap also gives a
  read-only file system that contains only the interpreter and the system's libraries;
* landlock: no file access except reading the interpreter's own files;
* seccomp: an allowlist of system calls without processes, sockets, signals and writing files;
* rlimits: processor time, memory, file sizes, descriptors.

Nothing runs without either bubblewrap or seccomp together with landlock. Each job is a forked child in its
own session. It has one second, and only True or False is a verdict. Every other result (an exception, a
time-out, another type) is a :class:`SandboxError`, which means "no reward" and never 0.
"""

import atexit
import contextlib
import hashlib
import json
import os
import queue
import secrets
import selectors
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
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

MEMORY_LIMIT = 512 * 2**20
"""Address space of a job, in bytes."""
START_SECONDS = 20.0
"""Time limit for starting a worker, long enough for a busy machine."""
GRACE_SECONDS = 5.0
"""Time beyond a job's own limit after which a silent worker is considered dead."""
CACHED_VERDICTS = 100_000


class SandboxError(Exception):
    """A job gave no verdict; the message says why."""


class SandboxTimeoutError(SandboxError):
    """A job exceeded its time limit; a retry may succeed."""


Verdict = bool | SandboxError


@dataclass(frozen=True)
class Job:
    """The source of a function `evaluate(response) -> bool`, and the text to apply it to.

    Example:
        Job(source="def evaluate(response): return 'e' not in response", text="A short word")
    """

    source: str
    text: str

    @property
    def key(self) -> bytes:
        """Digest under which the verdict is cached."""
        parts = json.dumps([self.source, self.text]).encode()
        return hashlib.blake2b(parts, digest_size=16).digest()


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The layers that a jail is built from."""

    wrapper: str
    landlock: bool = True
    seccomp: str | None = field(default_factory=seccomp_program)


class Sandbox:
    """The pool of workers, which ends with the process or with :meth:`close`.

    It serves one call at a time. A new call cancels the queued jobs of an abandoned one.
    """

    def __init__(
        self, *, workers: int | None = None, seconds: float = 1.0, layers: Layers | None = None
    ) -> None:
        """Set up the given jail, or the best one available.

        Args:
            seconds: Wall-clock limit of a job.

        Raises:
            UsageError: Neither bubblewrap nor seccomp with landlock can be set up.
        """
        self._seconds = seconds
        self._layers, probe = _first_worker(layers, seconds)
        self.layers: tuple[str, ...] = probe.layers
        """Names of the layers in force."""
        self.pid_namespace = probe.pid_namespace
        probe.close()
        self._count = workers or min(4, os.cpu_count() or 1)
        self._verdicts: dict[bytes, bool] = {}
        self._call: object = None
        self._closed = False
        self._start()
        atexit.register(self.close)

    def run(self, jobs: Sequence[Job]) -> list[Verdict]:
        """The verdict of each job, in order, or why there is none. Verdicts are cached, errors are not."""
        if self._closed:
            return [SandboxError("the sandbox is closed")] * len(jobs)
        if os.getpid() != self._pid:
            self._start()  # threads do not survive a fork
        if len(self._verdicts) > CACHED_VERDICTS:
            self._verdicts.clear()
        keys = [job.key for job in jobs]
        call = self._call = object()
        pending: dict[bytes, Future[Verdict]] = {}
        for key, job in zip(keys, jobs, strict=True):
            if key not in self._verdicts and key not in pending:
                pending[key] = Future()
                self._jobs.put((call, job, pending[key]))
        found = {key: future.result() for key, future in pending.items()}
        self._verdicts |= {key: value for key, value in found.items() if isinstance(value, bool)}
        return [found[key] if key in found else self._verdicts[key] for key in keys]

    def close(self) -> None:
        """End the workers. Jobs still in the queue get no verdict."""
        atexit.unregister(self.close)
        self._closed = True
        self._call = None
        if os.getpid() == self._pid:
            for _ in range(self._count):
                self._jobs.put(None)
            with self._lock:
                for worker in self._workers:
                    worker.close()

    def _start(self) -> None:
        """Start one thread per worker: bubblewrap ends a worker together with the thread that started it."""
        self._pid = os.getpid()
        self._jobs: queue.SimpleQueue[tuple[object, Job, Future[Verdict]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._workers: set[_Worker] = set()
        for number in range(self._count):
            threading.Thread(target=self._serve, name=f"sandbox-{number}", daemon=True).start()

    def _serve(self) -> None:
        worker: _Worker | None = None
        while (item := self._jobs.get()) is not None:
            call, job, verdict = item
            if call is not self._call:
                verdict.set_result(SandboxError("the call was abandoned"))
                continue
            try:
                if worker is None:
                    worker = _Worker(self._layers, self._seconds)
                    with self._lock:
                        self._workers.add(worker)
                        if self._closed:
                            worker.close()
                verdict.set_result(worker.run(job))
            except Exception as error:  # any failure must reach the waiting caller
                # The worker has ended or is silent; the next job starts another one.
                if worker is not None:
                    worker.close()
                    with self._lock:
                        self._workers.discard(worker)
                worker = None
                verdict.set_result(error if isinstance(error, SandboxError) else SandboxError(repr(error)))


class _Worker:
    """One jailed interpreter and the pipes to it."""

    def __init__(self, layers: Layers, seconds: float) -> None:
        wrapper = wrapper_command(layers.wrapper)
        if wrapper is None:
            raise SandboxError(f"{layers.wrapper} is not installed")
        self._seconds = seconds
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
            raise SandboxError(f"cannot start the worker: {error}") from error
        settings = {
            "seconds": seconds,
            "memory": MEMORY_LIMIT,
            "landlock": layers.landlock,
            "readable": readable_directories(),
            "seccomp": layers.seccomp,
            "caller_pid_namespace": os.readlink("/proc/self/ns/pid") if sys.platform == "linux" else "",
        }
        try:
            jail = self._exchange(settings, START_SECONDS)
        except SandboxError as error:
            self._process.kill()
            assert self._process.stderr is not None
            lines = self._process.stderr.read().decode(errors="replace").strip().splitlines()
            self.close()
            raise SandboxError(lines[-1] if lines else str(error)) from error
        wrappers = () if layers.wrapper == "none" else (layers.wrapper,)
        self.layers = (*wrappers, *jail["layers"])
        self.pid_namespace: str = jail["pid_namespace"]

    def run(self, job: Job) -> Verdict:
        """The job's verdict. Raises SandboxError if the worker itself failed."""
        # Jobs never see the token, so what one leaves in the pipe cannot pass for another's verdict.
        token = secrets.token_hex(8)
        request = {"source": job.source, "text": job.text, "token": token}
        response = self._exchange(request, self._seconds + GRACE_SECONDS)
        if response.get("token") != token:
            raise SandboxError("the worker's response belongs to another job")
        if isinstance(response.get("value"), bool):
            return response["value"]
        kind = SandboxTimeoutError if response.get("expired") else SandboxError
        return kind(str(response.get("error", "no verdict")))

    def close(self) -> None:
        self._process.kill()
        with contextlib.suppress(OSError), self._process:
            pass  # leaving the context closes the pipes and waits

    def _exchange(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            # select.select does not support descriptors above 1,023.
            with selectors.DefaultSelector() as selector:
                selector.register(self._process.stdout, selectors.EVENT_READ)
                if not selector.select(seconds):
                    raise SandboxError("the worker did not respond")
            return json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:
            raise SandboxError("the worker has ended") from error


def _first_worker(layers: Layers | None, seconds: float) -> tuple[Layers, _Worker]:
    """A worker in the best jail that can be set up."""
    tried: list[str] = []
    for candidate in [layers] if layers else [Layers(wrapper=wrapper) for wrapper in WRAPPERS]:
        try:
            worker = _Worker(candidate, seconds)
        except SandboxError as error:
            tried.append(f"{candidate.wrapper}: {error}")
            continue
        if "bubblewrap" in worker.layers or {"seccomp", "landlock"} <= set(worker.layers):
            return candidate, worker
        tried.append(f"only {', '.join(worker.layers)}")
        worker.close()
    raise UsageError(
        f"code verifiers cannot run: no jail could be set up ({'; '.join(tried)}). On Linux, install "
        "bubblewrap, or 'uniapl[sandbox]' (seccomp) on a kernel with landlock"
    )
