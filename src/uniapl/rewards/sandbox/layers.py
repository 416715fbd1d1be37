"""What a jail is built from: namespaces by bubblewrap or unshare, and the seccomp filter."""

import base64
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SYSTEM_CALLS = """
    read readv write writev close lseek fstat stat lstat newfstatat statx access faccessat faccessat2
    readlink readlinkat getcwd getdents64 mmap munmap mprotect mremap madvise brk futex membarrier rseq
    set_robust_list rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack getrandom
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrusage restart_syscall
    select pselect6 poll ppoll sched_yield sched_getaffinity
    getpid getppid gettid getuid geteuid getgid getegid uname exit exit_group
""".split()
"""All that a verifier may ask of the kernel, beside opening files for reading. None of them makes a process,
a socket or a file, sends a signal, or changes a limit."""

WRAPPERS = ("bubblewrap", "unshare", "none")


def wrapper_command(wrapper: str) -> list[str] | None:
    """The words in front of the worker's own command line; None where the program is not installed."""
    if wrapper == "none":
        return []
    program = shutil.which("bwrap" if wrapper == "bubblewrap" else wrapper)
    if program is None:
        return None
    if wrapper == "unshare":
        options = "--user --map-root-user --pid --fork --kill-child --mount-proc --net --ipc --uts"
        return [program, *options.split(), "--"]
    command = [program, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    for path in readable_directories():
        command += ["--ro-bind", path, path]
    for path in ("/lib", "/lib64"):
        if Path(path).is_symlink():
            command += ["--symlink", os.readlink(path), path]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    return [*command, "--proc", "/proc", "--dev", "/dev", "--remount-ro", "/", "--chdir", "/", "--"]


def worker_command() -> list[str]:
    """A bare interpreter with the worker's source: no site-packages, nothing to find.

    Not isolated (-I), which would ignore PYTHONHASHSEED; its environment is ours anyway.
    """
    source = (Path(__file__).parent / "worker.py").read_text(encoding="utf-8")
    return [os.path.realpath(sys.executable), "-s", "-P", "-S", "-B", "-c", source]


def readable_directories() -> list[str]:
    """Where the interpreter, its standard library and the system's shared libraries lie."""
    found = [sys.base_prefix, os.path.dirname(os.path.dirname(os.path.realpath(sys.executable)))]
    found += ["/usr", "/lib", "/lib64"]
    real = [path for path in dict.fromkeys(found) if Path(path).is_dir() and not Path(path).is_symlink()]
    return [path for path in real if not any(Path(other) in Path(path).parents for other in real)]


def seccomp_program() -> str | None:
    """The filter as a BPF program in base64; None where pyseccomp or libseccomp is missing."""
    try:
        import pyseccomp
    except (ImportError, OSError, RuntimeError, AttributeError):
        return None
    filter_ = pyseccomp.SyscallFilter(pyseccomp.ERRNO(1))
    for call in SYSTEM_CALLS:
        _allow(filter_, call, [])
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    for call, place in (("open", 1), ("openat", 2)):
        _allow(filter_, call, [pyseccomp.Arg(place, pyseccomp.MASKED_EQ, writing, 0)])
    with tempfile.TemporaryFile() as file:
        filter_.export_bpf(file)
        file.seek(0)
        return base64.b64encode(file.read()).decode()


def _allow(filter_: object, call: str, conditions: Sequence[object]) -> None:
    import pyseccomp

    # A call that this architecture does not have cannot be made either.
    if pyseccomp.resolve_syscall(pyseccomp.system_arch(), call) >= 0:
        filter_.add_rule(pyseccomp.ALLOW, call, *conditions)  # type: ignore[attr-defined]
