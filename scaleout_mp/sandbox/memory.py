"""How much memory the processes of a task have made their own.

Resident size counts the mapped model as well, which is shared and not the task's doing. So: RssAnon, swap, and of the
shared pages what goes beyond the bytes that were handed over. Sums over forks count copy-on-write pages once per fork;
`exact_memory` reads the proportional share instead, at a hundred times the cost. Facts: proc(5).
"""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Final

_KIB: Final = 1024
#: The kind of clock that counts the processor time of a whole process (linux/posix-timers.h).
_CPUCLOCK_SCHED: Final = 2
#: More than the line of /proc/<pid>/stat has.
_STAT_SIZE: Final = 2048
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_STATUS_FIELDS: Final = (b"RssAnon:", b"RssShmem:", b"VmSwap:")
_ROLLUP_FIELDS: Final = (b"Pss_Anon:", b"Pss_Shmem:", b"SwapPss:")


def _sum_fields(path: str, names: tuple[bytes, ...]) -> list[int]:
    with open(path, "rb") as file:
        lines = file.read().splitlines()
    found = dict.fromkeys(names, 0)
    for line in lines:
        name = line[: line.find(b":") + 1]
        if name in found:
            found[name] = int(line.split()[1]) * _KIB
    return list(found.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnMemory:
    """What some processes have made their own, in bytes."""

    #: Anonymous pages and swap.
    private: int
    #: Of pages that can be shared, those beyond what was handed over.
    shared: int

    @property
    def total(self) -> int:
        """Both."""
        return self.private + self.shared


def own_memory(pids: list[int], handed_over: int) -> OwnMemory:
    """Return what the processes have made their own; `handed_over` bytes of shared pages per process are free.

    An upper bound while processes of the task share pages. Processes that are gone count as nothing.
    """
    private = shared = 0
    for pid in pids:
        try:
            anon, shmem, swap = _sum_fields(f"/proc/{pid}/status", _STATUS_FIELDS)
        except OSError:
            continue
        private += anon + swap
        shared += max(0, shmem - handed_over)
    return OwnMemory(private=private, shared=shared)


def exact_memory(pids: list[int], handed_over: int) -> OwnMemory:
    """Return the same with each shared page counted once over all who share it. 1 ms a process, 10 ms a large one."""
    private = shared = 0
    for pid in pids:
        try:
            anon, shmem, swap = _sum_fields(f"/proc/{pid}/smaps_rollup", _ROLLUP_FIELDS)
        except OSError:
            continue
        private += anon + swap
        shared += shmem
    return OwnMemory(private=private, shared=max(0, shared - handed_over))


def descendants(root: int, *, most: int | None = None) -> list[int]:
    """Return `root` and the processes below it, parents first. Orphans are not found; their tag finds them.

    `most`: look no further once there are more than so many.
    """
    pids = [root]
    for pid in pids:
        if most is not None and len(pids) > most:
            return pids
        try:
            threads = os.listdir(f"/proc/{pid}/task")
        except OSError:
            continue
        for thread in threads:
            try:
                with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                    pids.extend(int(child) for child in file.read().split())
            except OSError:
                continue
    return pids


def shared_size(pid: int) -> int:
    """Return the bytes of shared pages that a process has mapped and touched. Raises OSError when it is gone."""
    return _sum_fields(f"/proc/{pid}/status", (b"RssShmem:",))[0]


class ProcessorClock:
    """Reads what one process uses of the processors, many times: its file in /proc stays open."""

    def __init__(self, pid: int) -> None:
        """Raises OSError when there is no such process."""
        # By the clock that clock_getcpuclockid(3) names, to the nanosecond.
        self._clock = (~pid << 3) | _CPUCLOCK_SCHED
        self._stat = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)

    def seconds(self) -> float | None:
        """Return the processor time of the process and the children that it waited for; None when it is gone."""
        try:
            own = time.clock_gettime(self._clock)
            stat = os.pread(self._stat, _STAT_SIZE, 0)
        except OSError:
            return None
        waited = sum(int(value) for value in stat[stat.rindex(b")") + 2 :].split()[13:15])
        return own + waited / _TICKS

    def close(self) -> None:
        """Close the file. Safe to call again."""
        if self._stat >= 0:
            os.close(self._stat)
            self._stat = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessorUse:
    """What some processes use of the processors."""

    #: User and system time, with that of children that they waited for.
    seconds: float
    #: Threads of all of them, each process's first one included.
    threads: int


def processor_use(pids: list[int]) -> ProcessorUse:
    """Sum up the processes that are still there."""
    ticks = threads = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                stat = file.read()
        except OSError:
            continue
        # The name in parentheses may hold anything; fields are counted from behind it.
        fields = stat[stat.rindex(b")") + 2 :].split()
        ticks += sum(int(value) for value in fields[11:15])
        threads += int(fields[17])
    return ProcessorUse(seconds=ticks / _TICKS, threads=threads)
