"""The program inside the jail: reads one JSON job per line, runs each in a child, and writes one JSON result.

It runs from its source in a bare interpreter and therefore imports only the standard library. The first line
of its input holds the settings, and the first line of its output lists the layers in force.
"""

import base64
import contextlib
import ctypes
import fcntl
import importlib
import json
import os
import random
import resource
import select
import signal
import struct
import sys
import time
from typing import Any

# Modules that verifiers often import: loaded here once, each forked child has them in memory.
for module in "collections datetime functools itertools math re statistics string unicodedata".split():
    importlib.import_module(module)

OUTPUT_LIMIT = 1 << 20
"""Bytes that a job may print; its output is discarded."""
RESULT_LIMIT = 1 << 16
"""Bytes of a job's result; a longer one is no verdict."""
PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 4, 38, 22, 2
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same on every architecture
READ_FILE, READ_DIR = 1 << 2, 1 << 3

libc = ctypes.CDLL(None, use_errno=True)


class Filter(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def restrict_files(readable: list[str]) -> bool:
    """Landlock: allow only reading below some directories; no TCP, no signals to processes outside."""
    version = libc.syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return False
    # Deny every right that this kernel knows: 13 in the first version, three more in later ones.
    rights = 13 + (version >= 2) + (version >= 3) + (version >= 5)
    # struct landlock_ruleset_attr: file rights, network rights (version 4), scopes (version 6).
    size = 8 if version < 4 else 16 if version < 6 else 24
    denied = struct.pack("QQQ", (1 << rights) - 1, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    ruleset = libc.syscall(LANDLOCK_CREATE, denied, size, 0)
    if ruleset < 0:
        return False
    for path in readable:
        directory = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", READ_FILE | READ_DIR, directory)  # struct landlock_path_beneath_attr
        libc.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0)
        os.close(directory)
    restricted = libc.syscall(LANDLOCK_RESTRICT, ruleset, 0) == 0
    os.close(ruleset)
    return restricted


def restrict_calls(program: bytes) -> bool:
    """Seccomp: allow this process only the system calls that the filter lists."""
    filter_ = Filter(len(program) // 8, program)
    return libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(filter_), 0, 0) == 0


def run_child(job: dict[str, Any], results: int, settings: dict[str, Any], program: bytes | None) -> None:
    """Run the function of a job in this process, which exits afterwards, and write its result."""
    os.setsid()
    output = os.memfd_create("output")
    for target, descriptor in enumerate((settings["null"], output, output, results)):
        os.dup2(descriptor, target)
    os.closerange(4, 1024)
    for kind, limit in (
        (resource.RLIMIT_CPU, max(1, round(settings["seconds"]) + 1)),
        (resource.RLIMIT_AS, settings["memory"]),
        (resource.RLIMIT_FSIZE, OUTPUT_LIMIT),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    random.seed(0)
    if program is not None and not restrict_calls(program):
        os._exit(1)
    try:
        names: dict[str, Any] = {"__name__": "verifier"}
        exec(compile(job["source"], "<verifier>", "exec"), names)
        if "evaluate" not in names:
            raise NameError("the source defines no function 'evaluate'")
        value = names["evaluate"](job["text"])
        is_verdict = value is True or value is False
        result = {"value": value} if is_verdict else {"error": f"returned {type(value).__name__}, not a bool"}
    except BaseException as error:
        result = {"error": f"{type(error).__name__}: {error}"[:300]}
    os.write(3, json.dumps(result).encode())


def run_job(job: dict[str, Any], settings: dict[str, Any], program: bytes | None) -> dict[str, Any]:
    """The result of a job, or why there is none. No process that it started is left when this returns."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            run_child(job, writing, settings, program)
        finally:
            os._exit(0)
    os.close(writing)
    deadline = time.monotonic() + settings["seconds"]
    written, expired = b"", False
    while len(written) <= RESULT_LIMIT:
        left = deadline - time.monotonic()
        expired = left <= 0 or not select.select([reading], [], [], left)[0]
        part = b"" if expired else os.read(reading, 1 << 16)
        if not part:
            break
        written += part
    os.close(reading)
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(child, signal.SIGKILL)
    if settings["own_pid_namespace"]:
        # Processes that left the group: in a namespace of our own, -1 means every process of this jail.
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
    os.waitpid(child, 0)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    if expired:
        return {"error": f"no result within {settings['seconds']} s", "expired": True}
    with contextlib.suppress(ValueError):
        result = json.loads(written)
        if isinstance(result, dict) and {"value", "error"} & result.keys():
            return result  # pyright: ignore[reportUnknownVariableType] - uniapl.untyped is outside of the jail
    return {"error": "ended without a result"}


def main() -> None:
    """Set up the jail, report its layers, and serve jobs until the input ends."""
    settings = json.loads(sys.stdin.buffer.readline())
    namespace = os.readlink("/proc/self/ns/pid")
    settings["own_pid_namespace"] = namespace != settings["caller_pid_namespace"]
    # The descriptor that os.open returns keeps number 3 occupied; a child moves its result pipe there.
    settings["null"] = fcntl.fcntl(os.open("/dev/null", os.O_RDWR), fcntl.F_DUPFD, 10)
    layers = ["rlimits"]
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # Children have the same user; this denies them the worker's memory and pipes in /proc.
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    if settings["landlock"] and restrict_files(settings["readable"]):
        layers.append("landlock")
    program = base64.b64decode(settings["seccomp"]) if settings["seccomp"] else None
    if program is not None:
        layers.append("seccomp")
    response = {"layers": layers, "pid_namespace": namespace}
    while True:
        sys.stdout.buffer.write(json.dumps(response).encode() + b"\n")
        sys.stdout.buffer.flush()
        line = sys.stdin.buffer.readline()
        if not line:
            return
        job = json.loads(line)
        token = job.pop("token")
        response = {**run_job(job, settings, program), "token": token}


if __name__ == "__main__":
    main()
