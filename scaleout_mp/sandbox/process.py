"""The process controls that Python does not offer: prctl(2), and a few files under /proc.

Every function works on the calling process unless it says otherwise. Facts: prctl(2), proc(5).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_CHILD_SUBREAPER: Final = 36

_libc: Final = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}, {value}): {os.strerror(number)}")


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends; exit now if that happened already.

    `parent` is the pid that must still be the parent: the signal is not sent for a death before the call.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def outlive_parent() -> None:
    """Take back `die_with_parent`."""
    _prctl(_PR_SET_PDEATHSIG, 0)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies (child subreaper)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def forbid_core_files() -> None:
    """Write no core file when this process or a descendant crashes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def prefer_for_oom_kill() -> None:
    """Have the kernel's out-of-memory killer take this process before any other."""
    # A read-only /proc refuses it; the order of victims is then the kernel's own.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")


def limit_data(limit: int, slack: int) -> None:
    """Bound private writable memory (RLIMIT_DATA) to what this process has now plus `limit` plus `slack` bytes.

    It is the kernel's backstop behind the watchdog: an allocation past it fails at once.
    """
    most = data_size() + limit + slack
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or most < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def data_size() -> int:
    """Return the bytes of data and stack mappings that RLIMIT_DATA counts (VmData)."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[5]) * resource.getpagesize()


def thread_count() -> int:
    """Return how many threads this process has, those of C libraries included."""
    return len(os.listdir("/proc/self/task"))


def has_children() -> bool:
    """Whether the calling thread's process has a child, running or not yet reaped; True where the kernel doesn't say."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", "rb") as file:
            return bool(file.read().strip())
    except OSError:
        return True


def reset_signals() -> None:
    """Give every signal its default action and unblock all: a task starts as a fresh program would."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if number not in {signal.SIGKILL, signal.SIGSTOP} and signal.getsignal(number) is not signal.SIG_DFL:
            # Real-time signals that the C library keeps for itself cannot be set.
            with contextlib.suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    # A broken pipe is an exception in Python programs, not a death.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
