"""The program inside the jail: a JSON job per line in, a JSON answer per line out, each job in its own child.

It is run from its source by a bare interpreter, so it imports the standard library alone. The first line
holds the settings; the answer to it says which layers are in force. The modules that verifiers often import
are loaded here once, so that a child finds them in its memory.
"""

import base64
import collections  # noqa: F401
import contextlib
import ctypes
import datetime  # noqa: F401
import fcntl
import functools  # noqa: F401
import itertools  # noqa: F401
import json
import math  # noqa: F401
import os
import random
import re  # noqa: F401
import resource
import select
import signal
import statistics  # noqa: F401
import string  # noqa: F401
import sys
import time
import unicodedata  # noqa: F401

OUTPUT_LIMIT = 1 << 20
"""Bytes that a job may print; what it prints is thrown away."""
ANSWER_LIMIT = 1 << 16
"""Bytes of a job's own answer; more than that is no verdict."""
PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 4, 38, 22, 2
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same on every architecture
READ_FILE, READ_DIR = 1 << 2, 1 << 3

libc = ctypes.CDLL(None, use_errno=True)


class Filter(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


class Ruleset(ctypes.Structure):
    """struct landlock_ruleset_attr, as of ABI 6."""

    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


class PathBeneath(ctypes.Structure):
    """struct landlock_path_beneath_attr."""

    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("directory", ctypes.c_int32))


def restrict_files(readable: list[str]) -> bool:
    """Landlock: of the file system only reading below some directories, no TCP, no signals to outside."""
    version = libc.syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return False
    # Every right that this kernel knows is taken away: 13 kinds in the first version, three more came later.
    rights = 13 + (version >= 2) + (version >= 3) + (version >= 5)
    wanted = Ruleset((1 << rights) - 1, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = libc.syscall(LANDLOCK_CREATE, ctypes.byref(wanted), size, 0)
    if ruleset < 0:
        return False
    for path in readable:
        directory = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = PathBeneath(READ_FILE | READ_DIR, directory)
        libc.syscall(LANDLOCK_ADD, ruleset, 1, ctypes.byref(rule), 0)
        os.close(directory)
    restricted = libc.syscall(LANDLOCK_RESTRICT, ruleset, 0) == 0
    os.close(ruleset)
    return restricted


def restrict_calls(program: bytes) -> bool:
    """Seccomp: this process may make no system call that the filter does not list."""
    filter_ = Filter(len(program) // 8, program)
    return libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(filter_), 0, 0) == 0


def run_child(job: dict, answers: int, settings: dict, program: bytes | None) -> None:
    """Run the function of a job in this process, which ends with it, and write its answer."""
    os.setsid()
    output = os.memfd_create("output")
    for place, descriptor in ((0, settings["null"]), (1, output), (2, output), (3, answers)):
        os.dup2(descriptor, place)
    os.closerange(4, 1024)
    seconds = max(1, round(settings["seconds"]) + 1)
    for kind, limit in (
        (resource.RLIMIT_CPU, seconds),
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
        names: dict = {"__name__": "verifier"}
        exec(compile(job["source"], "<verifier>", "exec"), names)
        if "evaluate" not in names:
            raise NameError("it defines no function 'evaluate'")
        value = names["evaluate"](job["text"])
        known = value is True or value is False
        answer = {"value": value} if known else {"error": f"returned {type(value).__name__}, not a bool"}
    except BaseException as error:
        answer = {"error": f"{type(error).__name__}: {error}"[:300]}
    os.write(3, json.dumps(answer).encode())


def run_job(job: dict, settings: dict, program: bytes | None) -> dict:
    """A job's answer, or why there is none; nothing that it started is left when this returns."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            run_child(job, writing, settings, program)
        finally:
            os._exit(0)
    os.close(writing)
    deadline = time.monotonic() + settings["seconds"]
    said, expired = b"", False
    while len(said) <= ANSWER_LIMIT:
        left = deadline - time.monotonic()
        expired = left <= 0 or not select.select([reading], [], [], left)[0]
        part = b"" if expired else os.read(reading, 1 << 16)
        if not part:
            break
        said += part
    os.close(reading)
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(child, signal.SIGKILL)
    if settings["own_pid_namespace"]:
        # Whatever escaped the group: in a namespace of our own, "everybody" is this jail.
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
    os.waitpid(child, 0)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    if expired:
        return {"error": f"no answer within {settings['seconds']} s", "expired": True}
    try:
        answer = json.loads(said)
    except ValueError:
        return {"error": "ended without an answer"}
    if not isinstance(answer, dict) or not ({"value", "error"} & answer.keys()):
        return {"error": "ended without an answer"}
    return answer


def main() -> None:
    """Set the jail up, say what it consists of, and serve jobs until there are no more."""
    settings = json.loads(sys.stdin.buffer.readline())
    namespace = os.readlink("/proc/self/ns/pid")
    settings["own_pid_namespace"] = namespace != settings["caller_pid_namespace"]
    # The first one keeps place 3 taken, to which a child moves the pipe for its answer.
    settings["null"] = fcntl.fcntl(os.open("/dev/null", os.O_RDWR), fcntl.F_DUPFD, 10)
    layers = ["rlimits"]
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # Its memory and its pipes, in /proc, are then closed to the children, who have the same user.
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    if settings["landlock"] and restrict_files(settings["readable"]):
        layers.append("landlock")
    program = base64.b64decode(settings["seccomp"]) if settings["seccomp"] else None
    if program is not None:
        layers.append("seccomp")
    said = {"layers": layers, "pid_namespace": namespace}
    while True:
        sys.stdout.buffer.write(json.dumps(said).encode() + b"\n")
        sys.stdout.buffer.flush()
        line = sys.stdin.buffer.readline()
        if not line:
            return
        job = json.loads(line)
        token = job.pop("token")
        said = {**run_job(job, settings, program), "token": token}


if __name__ == "__main__":
    main()
