"""The parts of a jail: the bubblewrap or unshare command line, and the seccomp filter."""

import base64
import os
import shutil
import sys
import tempfile
from pathlib import Path

SYSTEM_CALLS = """
    read readv write writev close lseek fstat stat lstat newfstatat statx access faccessat faccessat2
    readlink readlinkat getcwd getdents64 mmap munmap mprotect mremap madvise brk futex membarrier rseq
    set_robust_list rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack getrandom
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrusage restart_syscall
    select pselect6 poll ppoll sched_yield sched_getaffinity
    getpid getppid gettid getuid geteuid getgid getegid uname exit exit_group
""".split()
"""System calls that a verifier may make, in addition to opening files for reading. None of them creates a
process, a socket or a file, sends a signal, or changes a limit."""

WRAPPERS = ("bubblewrap", "unshare", "none")


def wrapper_command(wrapper: str) -> list[str] | None:
    """The command that the worker's command line is appended to; None if it is not installed."""
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
    """A bare interpreter, without site-packages, that runs the worker's source."""
    # -I (isolated mode) would ignore PYTHONHASHSEED. The environment is already a minimal one.
    source = (Path(__file__).parent / "worker.py").read_text(encoding="utf-8")
    return [os.path.realpath(sys.executable), "-s", "-P", "-S", "-B", "-c", source]


def readable_directories() -> list[str]:
    """Directories of the interpreter, its standard library and the system's shared libraries."""
    found = [sys.base_prefix, os.path.dirname(os.path.dirname(os.path.realpath(sys.executable)))]
    found += ["/usr", "/lib", "/lib64"]
    real = [path for path in dict.fromkeys(found) if Path(path).is_dir() and not Path(path).is_symlink()]
    return [path for path in real if not any(Path(other) in Path(path).parents for other in real)]


def seccomp_program() -> str | None:
    """The filter as a base64-encoded BPF program; None if pyseccomp or libseccomp is missing."""
    try:
        import pyseccomp
    except (ImportError, OSError, RuntimeError, AttributeError):
        return None
    filter_ = pyseccomp.SyscallFilter(pyseccomp.ERRNO(1))
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    conditions = {
        call: [pyseccomp.Arg(position, pyseccomp.MASKED_EQ, writing, 0)]
        for call, position in (("open", 1), ("openat", 2))
    }
    for call in (*SYSTEM_CALLS, *conditions):
        # A call that this architecture does not have cannot be made and needs no rule.
        if pyseccomp.resolve_syscall(pyseccomp.system_arch(), call) >= 0:
            filter_.add_rule(pyseccomp.ALLOW, call, *conditions.get(call, ()))
    with tempfile.TemporaryFile() as file:
        filter_.export_bpf(file)
        file.seek(0)
        return base64.b64encode(file.read()).decode()
