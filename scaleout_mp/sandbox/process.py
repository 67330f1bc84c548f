"""The process controls that Python does not offer: prctl(2), and a few files under /proc.

Every function works on the calling process unless it says otherwise. Facts: prctl(2), proc(5).
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import contextlib
import ctypes
import os
import resource
import signal
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import FrameType

_PR_SET_PDEATHSIG: Final = 1
_PR_GET_DUMPABLE: Final = 3
_PR_SET_DUMPABLE: Final = 4
_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_SET_PTRACER: Final = 0x59616D61

#: On this signal a task writes the Python stacks of all its threads to `STACK_DESCRIPTOR`. A real-time signal that no
#: library is known to use; SIGUSR1 and SIGUSR2 belong to the user.
STACK_SIGNAL: Final = 50
#: The same, between two of its instructions: safe at any moment, and not answered while it is busy in C.
GENTLE_STACK_SIGNAL: Final = 51
STACK_DESCRIPTOR: Final = 4

_prctl_call: Final = ctypes.CDLL(None, use_errno=True).prctl
_prctl_call.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
_prctl_call.restype = ctypes.c_int

#: Python programs start with these ignored: a broken pipe or a full quota is an exception, not a death.
_IGNORED_BY_PYTHON: Final = frozenset({signal.SIGPIPE, signal.SIGXFSZ})


def prctl(option: int, value: int, extra: int = 0) -> int:
    """Change or read one property of this process. Raises OSError."""
    result = _prctl_call(option, value, extra, 0, 0)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}, {value}): {os.strerror(number)}")
    return int(result)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends; exit now if that happened already.

    `parent` is the pid that must still be the parent: the signal is not sent for a death before the call.
    """
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies (child subreaper)."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def is_dumpable() -> bool:
    """Whether other processes of this user may look into this one."""
    return bool(_prctl_call(_PR_GET_DUMPABLE, 0, 0, 0, 0) == 1)


def set_dumpable(allowed: bool) -> None:
    """Let other processes of this user look into this one, or forbid it."""
    prctl(_PR_SET_DUMPABLE, int(allowed))


def may_be_read_by(pid: int) -> None:
    """Let a process, and its descendants, read this one's memory where yama would have forbidden it.

    Each fork of this process has to allow it anew. What else stands in the way stays.
    """
    # Without yama there is no such property.
    with contextlib.suppress(OSError):
        prctl(_PR_SET_PTRACER, pid)


def run_before_others() -> None:
    """Have this process run whenever it wants to, where that is permitted; what it forks does not."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))


def run_as_others_do() -> None:
    """Undo `run_before_others`."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def forbid_new_privileges() -> None:
    """Have set-id programs and file capabilities give nothing, to this process and every descendant."""
    prctl(_PR_SET_NO_NEW_PRIVS, 1)


def forbid_core_files() -> None:
    """Write no core file when this process or a descendant crashes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def prefer_for_oom_kill() -> None:
    """Have the kernel's out-of-memory killer take this process before any other."""
    # A read-only /proc refuses it; the order of victims is then the kernel's own.
    with contextlib.suppress(OSError):
        write_file("/proc/self/oom_score_adj", b"1000")


def write_file(path: str, data: bytes) -> None:
    """Write a file of the kernel's. Raises OSError."""
    # Without a file object: its codec and buffers are pages to copy, right after a fork.
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def read_file(path: str) -> bytes:
    """Read a file of the kernel's. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return b"".join(iter(lambda: os.read(descriptor, 1 << 14), b""))
    finally:
        os.close(descriptor)


def limit_own(kind: int, most: int) -> None:
    """Lower one of this process's resource limits for good, soft and hard; one that is lower already stays."""
    _, hard = resource.getrlimit(kind)
    if hard == resource.RLIM_INFINITY or most < hard:
        resource.setrlimit(kind, (most, most))


def limit_data(limit: int, slack: int) -> None:
    """Bound private writable memory (RLIMIT_DATA) to what this process has now plus `limit` plus `slack` bytes.

    It is the kernel's backstop behind the watchdog: an allocation past it fails at once.
    """
    limit_own(resource.RLIMIT_DATA, data_size() + limit + slack)


def data_size() -> int:
    """Return the bytes of data and stack mappings that RLIMIT_DATA counts (VmData)."""
    return int(read_file("/proc/self/statm").split()[5]) * resource.getpagesize()


def thread_count() -> int:
    """Return how many threads this process has, those of C libraries included."""
    return len(os.listdir("/proc/self/task"))


def kill_children(pids: Iterable[int], *, groups: bool) -> None:
    """Kill children, reaped by nobody yet; with `groups`, the process groups that they are in, except this process's.

    Those of a group die at once, before any of them can fork again (setpgid(2), fork(2)).
    """
    # Once each: it takes the kernel time for every zombie in it.
    done = {0, os.getpgrp()}
    for pid in pids:
        # A child keeps its pid until it is reaped, and its group's number belongs to nobody else as long.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            group = os.getpgid(pid) if groups else 0
            os.kill(pid, signal.SIGKILL)
            if group not in done:
                done.add(group)
                os.killpg(group, signal.SIGKILL)


def children() -> list[int]:
    """Return the pids of this single-threaded process's children, zombies included."""
    return children_of(os.getpid())


def children_of(parent: int) -> list[int]:
    """Return the pids of the children of a single-threaded process, zombies included."""
    try:
        return [int(pid) for pid in read_file(f"/proc/{parent}/task/{parent}/children").split()]
    except OSError:
        # A kernel without CONFIG_PROC_CHILDREN.
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _parent(pid) == parent]


def _parent(pid: int) -> int:
    try:
        stat = read_file(f"/proc/{pid}/stat")
    except OSError:
        return 0
    return int(stat[stat.rindex(b")") + 2 :].split()[1])


def changed_signals() -> list[int]:
    """Return the signals whose action here is not that of a fresh Python program."""
    return [
        int(number)
        for number in signal.valid_signals() - _IGNORED_BY_PYTHON
        if signal.getsignal(number) not in {signal.SIG_DFL, None}
    ]


def call_on_signal(number: int, handler: Callable[[int, FrameType | None], object]) -> None:
    """Have a signal handled between two instructions of Python; it interrupts system calls, as waits for a lock."""
    _signal.signal(number, handler)


def reset_signals(changed: Iterable[int]) -> None:
    """Give `changed` signals their default action and unblock all: a task starts as a fresh program would."""
    # The functions below the module `signal`, which make enums of all they return: code to run and pages to copy.
    _signal.set_wakeup_fd(-1)
    for number in changed:
        _signal.signal(number, _signal.SIG_DFL)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
