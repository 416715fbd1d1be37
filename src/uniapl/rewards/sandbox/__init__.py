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


class SandboxTimeoutError(SandboxError):
    """It took too long: another time it may not."""


@dataclass(frozen=True)
class Job:
    """The source of a function `evaluate(response) -> bool`, and one text.

    Example:
        Job(source="def evaluate(response): return 'e' not in response", text="A short word")
    """

    source: str
    text: str

    @property
    def key(self) -> bytes:
        """What it is remembered by."""
        parts = json.dumps([self.source, self.text]).encode()
        return hashlib.blake2b(parts, digest_size=16).digest()


_Question = tuple[object, bytes, Job, "queue.SimpleQueue[tuple[bytes, bool | SandboxError]]"]
"""(the call that it belongs to, its key, itself, where the answer goes)."""


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
    """The pool. Close it, or leave that to the end of the process.

    One call at a time: a new one ends what an earlier one, whose caller has given up on it, still had to do.
    """

    def __init__(
        self, *, workers: int | None = None, limits: Limits | None = None, layers: Layers | None = None
    ) -> None:
        """Find the best jail that there is, or set up the one that is asked for.

        Raises:
            UsageError: It would not be a jail: neither bubblewrap nor seccomp with landlock can be set up.
        """
        self.limits = limits or Limits()
        self._layers, probe = _first_worker(layers, self.limits)
        self.layers: tuple[str, ...] = probe.layers
        """What is in force, by name."""
        self.pid_namespace = probe.pid_namespace
        probe.close()
        self._count = workers or min(4, os.cpu_count() or 1)
        self._verdicts: dict[bytes, bool] = {}
        self._call: object = None
        self._closed = False
        self._start()
        atexit.register(self.close)

    def run(self, jobs: Sequence[Job]) -> list[bool | SandboxError]:
        """The verdict of each job, in order, or why there is none; verdicts are remembered."""
        if self._closed:
            return [SandboxError("the sandbox is closed")] * len(jobs)
        if os.getpid() != self._pid:
            self._start()  # threads do not survive a fork
        if len(self._verdicts) > CACHED_VERDICTS:
            self._verdicts.clear()
        keys = [job.key for job in jobs]
        unknown = {key: job for key, job in zip(keys, jobs, strict=True) if key not in self._verdicts}
        call = self._call = object()
        answered: queue.SimpleQueue[tuple[bytes, bool | SandboxError]] = queue.SimpleQueue()
        for key, job in unknown.items():
            self._jobs.put((call, key, job, answered))
        found = dict(answered.get() for _ in unknown)
        self._verdicts |= {key: value for key, value in found.items() if isinstance(value, bool)}
        return [found[key] if key in found else self._verdicts[key] for key in keys]

    def close(self) -> None:
        """End the workers; what is still asked of them gets no verdict."""
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
        """Threads that each own a worker: bubblewrap ends one together with the thread that started it."""
        self._pid = os.getpid()
        self._jobs: queue.SimpleQueue[_Question | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._workers: set[_Worker] = set()
        for number in range(self._count):
            threading.Thread(target=self._serve, name=f"sandbox-{number}", daemon=True).start()

    def _serve(self) -> None:
        worker: _Worker | None = None
        while (question := self._jobs.get()) is not None:
            call, key, job, answered = question
            if call is not self._call:
                answered.put((key, SandboxError("its caller has given up")))
                continue
            try:
                worker = worker or self._new_worker()
                answered.put((key, worker.ask(job)))
            except Exception as error:  # whatever it is: who waits must hear of it
                # The worker itself is gone or mute; the next job gets a new one.
                if worker is not None:
                    worker.close()
                    with self._lock:
                        self._workers.discard(worker)
                worker = None
                answered.put((key, error if isinstance(error, SandboxError) else SandboxError(repr(error))))

    def _new_worker(self) -> "_Worker":
        worker = _Worker(self._layers, self.limits)
        with self._lock:
            self._workers.add(worker)
            if self._closed:
                worker.close()
        return worker


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
        # Only the worker knows it: nothing that a job may leave in the pipe passes for another job's answer.
        token = secrets.token_hex(8)
        question = {"source": job.source, "text": job.text, "token": token}
        answer = self._exchange(question, self._seconds + GRACE_SECONDS)
        if answer.get("token") != token:
            raise SandboxError("the worker's answers are out of step")
        value = answer.get("value")
        if isinstance(value, bool):
            return value
        kind = SandboxTimeoutError if answer.get("expired") else SandboxError
        return kind(str(answer.get("error", "no verdict")))

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
            # Not select, which knows no descriptors above 1,023.
            with selectors.DefaultSelector() as selector:
                selector.register(self._process.stdout, selectors.EVENT_READ)
                if not selector.select(seconds):
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
