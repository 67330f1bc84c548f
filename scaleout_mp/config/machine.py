"""What this machine, or the cgroup that this process is in, has to give."""

from __future__ import annotations

import os
from typing import Final

#: What numerical libraries read when they are loaded, to learn how many threads to have.
THREAD_VARIABLES: Final = (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


def usable_memory() -> int:
    """Return the bytes of memory that this process could use: the machine's, or less where a cgroup says so."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([total, *_cgroup_limits()])


def usable_cores() -> int:
    """Return the number of processors that this process may run on."""
    return len(os.sched_getaffinity(0))


def wanted_threads() -> int:
    """Return how many threads numerical libraries should have: what the user's variables say, else the processors."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        # OMP_NUM_THREADS may be a list, one number for each level of nesting.
        value = os.environ.get(name, "").partition(",")[0].strip()
        if value.isdigit() and int(value) > 0:
            return int(value)
    return usable_cores()


def _cgroup_limits() -> list[int]:
    """Return the memory limits of this process's cgroup and those above it, of either version."""
    limits = []
    try:
        with open("/proc/self/cgroup", encoding="ascii") as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return []
    for _, controllers, path in lines:
        if controllers == "":
            root, name = "/sys/fs/cgroup", "memory.max"
        elif controllers == "memory":
            root, name = "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            try:
                with open("/".join([root, *parts[:depth], name]), encoding="ascii") as file:
                    limits.append(int(file.read()))
            except (OSError, ValueError):
                # Not there, seen from inside a container, or "max".
                continue
    return limits
