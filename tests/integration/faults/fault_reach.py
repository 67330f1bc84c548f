"""Attacks on supervisor, guardian and template. Signals are signal 0: it passes or fails as any other one would."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import platform
import resource
import signal
import struct

import numpy as np
from fault_catalogue import fault, needs_filter, say_ready

from scaleout_mp import EndReason, Limits
from scaleout_mp.sandbox import landlock

COMPLETED, CRASHED = EndReason.COMPLETED, EndReason.CRASHED
_libc = ctypes.CDLL(None, use_errno=True)
_CALLS = {
    "x86_64": {
        "ptrace": 101,
        "process_vm_writev": 311,
        "pidfd_getfd": 438,
        "kcmp": 312,
        "tgkill": 234,
        "ioprio_set": 251,
    }
    | {"rt_sigqueueinfo": 129, "setpriority": 141, "clone3": 435, "process_madvise": 440},
    "aarch64": {
        "ptrace": 117,
        "process_vm_writev": 271,
        "pidfd_getfd": 438,
        "kcmp": 272,
        "tgkill": 131,
        "ioprio_set": 30,
    }
    | {"rt_sigqueueinfo": 138, "setpriority": 140, "clone3": 435, "process_madvise": 440},
}
_PTRACE_ATTACH, _PTRACE_SEIZE = 16, 0x4206
_F_SETOWN_EX = 15
_PRIO_USER, _IOPRIO_WHO_USER = 2, 3


def _call(name, *arguments):
    """Make a system call; raise OSError when it fails."""
    if _libc.syscall(_CALLS[platform.machine()][name], *arguments) < 0:
        raise OSError(ctypes.get_errno(), name)


def _successes(attempts):
    """Return the names of the attempts that nothing stopped."""
    found = []
    for name, attempt in attempts.items():
        try:
            attempt()
        except (OSError, ValueError):
            continue
        found.append(name)
    return found


def _each(place, attempts):
    """Try `attempts`, by name, on each of the processes that a task must leave alone."""
    victims = {"supervisor": place.supervisor, "guardian": place.guardian, "template": place.template}
    return _successes(
        {
            f"{name} {victim}": (lambda attempt=attempt, pid=pid: attempt(pid))
            for victim, pid in victims.items()
            for name, attempt in attempts.items()
        }
    )


def _signal_by_descriptor(pid):
    descriptor = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(descriptor, 0)
    finally:
        os.close(descriptor)


def _signal_by_owner(command):
    """Have the kernel signal somebody whenever a socket can be read."""

    def attempt(pid):
        reader, writer = os.pipe()
        try:
            # By value, or in a struct f_owner_ex whose kind is F_OWNER_PID.
            fcntl.fcntl(reader, command, pid if command == fcntl.F_SETOWN else struct.pack("ii", 1, pid))
        finally:
            os.close(reader)
            os.close(writer)

    return attempt


@fault(COMPLETED, returns=[], needs=needs_filter)
def signal_those_above(place):
    return _each(
        place,
        {
            "kill": lambda pid: os.kill(pid, 0),
            "killpg": lambda pid: os.kill(-pid, 0),
            "group": lambda pid: os.killpg(os.getpgid(pid), 0),
            "tgkill": lambda pid: _call("tgkill", pid, pid, 0),
            "sigqueue": lambda pid: _call("rt_sigqueueinfo", pid, 0, bytes(128)),
            "pidfd": _signal_by_descriptor,
            "owner": _signal_by_owner(fcntl.F_SETOWN),
            "owner by reference": _signal_by_owner(_F_SETOWN_EX),
        },
    )


@fault(COMPLETED, returns=[], needs=needs_filter)
def signal_everybody(_):
    return _successes({"kill": lambda: os.kill(-1, 0)})


@fault(COMPLETED, returns=[], needs=needs_filter)
def trace_those_above(place):
    return _each(
        place,
        {
            "attach": lambda pid: _call("ptrace", _PTRACE_ATTACH, pid, 0, 0),
            "seize": lambda pid: _call("ptrace", _PTRACE_SEIZE, pid, 0, 0),
            "write": lambda pid: _call("process_vm_writev", pid, None, 0, None, 0, 0),
            "compare": lambda pid: _call("kcmp", pid, os.getpid(), 0, 0, 0),
        },
    )


def _needs_domain(stage):
    try:
        landlock.abi()
    except OSError as error:
        return f"no Landlock here: {error}"
    if stage.level in {"none", "basic"}:
        return f"level {stage.level!r} does not keep a task from what its user may read: docs/security.md"
    return None


@fault(COMPLETED, returns=[], needs=_needs_domain)
def look_into_those_above(place):
    def reopen(pid):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                os.close(os.open(f"/proc/{pid}/fd/{name}", os.O_RDONLY | os.O_NONBLOCK))

    def read(name):
        def attempt(pid):
            with open(f"/proc/{pid}/{name}", "rb") as file:
                file.read(1)

        return attempt

    return _each(
        place,
        {
            "descriptors": reopen,
            "write memory": lambda pid: os.close(os.open(f"/proc/{pid}/mem", os.O_RDWR)),
            "memory": lambda pid: os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY)),
            **{name: read(name) for name in ("environ", "maps", "auxv", "stack")},
        },
    )


def _needs_more_than_none(stage):
    return "at level 'none' tasks can do what their user can: docs/security.md" if stage.level == "none" else None


@fault(COMPLETED, returns=[], needs=_needs_more_than_none)
def look_into_those_that_close_themselves(place):
    attempts = {
        f"{victim} {name}": (lambda path=f"/proc/{pid}/{name}", mode=mode: os.close(os.open(path, mode)))
        for victim, pid in {"guardian": place.guardian, "template": place.template}.items()
        for name, mode in {"mem": os.O_RDWR, "environ": os.O_RDONLY, "maps": os.O_RDONLY}.items()
    }
    return _successes(attempts)


@fault(COMPLETED, returns=[], needs=needs_filter)
def take_descriptors_of_those_above(place):
    def take(pid):
        descriptor = os.pidfd_open(pid)
        try:
            _call("pidfd_getfd", descriptor, 0, 0)
        finally:
            os.close(descriptor)

    # The one call that would do it is forbidden by itself, and not for want of a descriptor of the process.
    def take_own():
        descriptor = os.pidfd_open(os.getpid())
        try:
            _call("pidfd_getfd", descriptor, 1, 0)
        finally:
            os.close(descriptor)

    return _each(place, {"take": take}) + _successes({"take at all": take_own})


@fault(COMPLETED, returns=[], needs=needs_filter)
def limit_those_above(place):
    return _each(
        place,
        {
            "descriptors": lambda pid: resource.prlimit(pid, resource.RLIMIT_NOFILE, (4, 4)),
            "files": lambda pid: resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, 0)),
        },
    )


@fault(COMPLETED, returns=[], needs=needs_filter)
def starve_those_above(place):
    group = os.getpgid
    return _each(
        place,
        {
            "affinity": lambda pid: os.sched_setaffinity(pid, {min(os.sched_getaffinity(0))}),
            "nice": lambda pid: os.setpriority(os.PRIO_PROCESS, pid, 19),
            "nice group": lambda pid: os.setpriority(os.PRIO_PGRP, group(pid), 19),
            "nice user": lambda _: os.setpriority(_PRIO_USER, os.getuid(), 19),
            "idle": lambda pid: os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0)),
            "disk": lambda pid: _call("ioprio_set", 1, pid, 3 << 13),
            "disk of the user": lambda _: _call("ioprio_set", _IOPRIO_WHO_USER, os.getuid(), 3 << 13),
        },
    )


@fault(COMPLETED, returns=[], needs=needs_filter)
def drop_the_tag(_):
    kind = resource.RLIMIT_RTTIME
    return _successes(
        {
            "setrlimit": lambda: resource.setrlimit(kind, (1, 1)),
            "prlimit": lambda: resource.prlimit(0, kind, (1, 1)),
            "own prlimit": lambda: resource.prlimit(os.getpid(), kind, (1, 1)),
        }
    )


@fault(COMPLETED, returns=[], needs=needs_filter)
def leave_by_a_new_namespace(_):
    new_user = 0x10000000
    return _successes(
        {
            "unshare": lambda: _raise_errno(_libc.unshare(new_user)),
            "clone3": lambda: _call("clone3", None, 0),
        }
    )


def _raise_errno(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")


def _unfiltered(stage):
    return "the system call filter forbids it, as another fault shows" if stage.filtered else None


@fault(CRASHED, says="the template process died of SIGKILL", needs=_unfiltered)
def kill_the_template(place):
    say_ready()
    os.kill(place.template, signal.SIGKILL)
    signal.pause()


@fault(CRASHED, says="the template process died", needs=_unfiltered)
def kill_the_guardian(place):
    say_ready()
    os.kill(place.guardian, signal.SIGKILL)
    signal.pause()


def _siblings():
    """Return the other children of this process's parent: other tasks, and the process for the next one."""
    parent = os.getppid()
    with contextlib.suppress(OSError), open(f"/proc/{parent}/task/{parent}/children") as file:
        return [int(pid) for pid in file.read().split() if int(pid) != os.getpid()]
    return []


@fault(COMPLETED, returns="done")
def kill_the_process_of_the_next_task(_):
    for pid in _siblings():
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    return "done"


@fault(COMPLETED, returns="done")
def be_the_first_to_die_of_memory(_):
    """What a task may change about itself only makes things worse for itself."""
    with open("/proc/self/oom_score_adj") as file:
        assert file.read().strip() == "1000"
    return "done"


def _needs_memory_group(stage):
    return None if stage.executor._core._groups is not None else "no memory cgroup can be made here"


def _own_memory_group():
    with open("/proc/self/cgroup") as file:
        lines = [line.rstrip("\n").split(":", 2) for line in file]
    for _, controllers, path in lines:
        if "memory" in controllers.split(","):
            return f"/sys/fs/cgroup/memory{path}"
    return "/sys/fs/cgroup" + next(path for _, controllers, path in lines if not controllers)


def _fill(size):
    """Touch `size` bytes; return nothing, since it is not expected to come so far."""
    held = np.ones(size, np.uint8)
    signal.pause()
    return held


@fault(EndReason.MEMORY_LIMIT, limits=Limits(memory="96MiB", abort_grace=0.3), needs=_needs_memory_group)
def leave_the_memory_group(_):
    folder = _own_memory_group()
    with contextlib.suppress(OSError), open(f"{os.path.dirname(os.path.dirname(folder))}/cgroup.procs", "w") as file:
        file.write("0")
    _fill(200 << 20)


@fault(EndReason.MEMORY_LIMIT, limits=Limits(memory="96MiB", abort_grace=0.3), needs=_needs_memory_group)
def raise_the_limit_of_the_memory_group(_):
    folder = _own_memory_group()
    for name in ("memory.max", "memory.memsw.limit_in_bytes", "memory.limit_in_bytes"):
        with contextlib.suppress(OSError), open(f"{folder}/{name}", "w") as file:
            file.write(str(1 << 40))
    _fill(200 << 20)


@fault(COMPLETED, returns="done")
def write_into_every_descriptor(_):
    """What a task holds beside its own files is its channel's end, its output and its place for stacks."""
    for name in os.listdir("/proc/self/fd"):
        number = int(name)
        if number in {0, 1, 2, 3}:
            continue
        with contextlib.suppress(OSError):
            os.pwrite(number, b"\xff" * mmap.PAGESIZE, 0)
        with contextlib.suppress(OSError):
            os.ftruncate(number, 1 << 40)
    say_ready()
    return "done"
