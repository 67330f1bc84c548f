"""Decides when a task has passed a limit that must be measured. It looks and says; others kill."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Final

from scaleout_mp.config.machine import usable_cores
from scaleout_mp.executor.report import StopCause, readable_size
from scaleout_mp.sandbox import memory, tree
from scaleout_mp.task import EndReason

if TYPE_CHECKING:
    from scaleout_mp.sandbox.cgroup import MemoryGroup

#: The fastest that memory is assumed to grow, bytes per second: with it a look is due before the limit can be reached.
_FASTEST_GROWTH: Final = 4e9
_SHORTEST: Final = 0.002
_LONGEST: Final = 0.25
_FIRST: Final = 0.03
#: A task near its limit that does not grow is looked at this seldom.
_CALM: Final = 0.02
#: Between two searches for orphans of the task, seconds.
_ORPHAN_SEARCH: Final = 0.1
#: Bytes by which the kernel's counters may be behind its own bound.
_KERNEL_SLACK: Final = 1 << 22
#: Processes that are looked at between two events of the loop.
_FEW: Final = 8
#: One search for the orphans of all tasks.
_census: Final = tree.Census(_ORPHAN_SEARCH)


@dataclasses.dataclass(kw_only=True)
class TreeWatch:
    """Follows what one task's tree uses. Sizes in bytes, times in seconds."""

    pid: int
    tag: int
    #: 0: no limit, only the peak is followed.
    memory_limit: int = 0
    #: Bytes of models that were handed over: shared pages that are not the task's doing.
    shared: int = 0
    cpu_limit: float | None = None
    #: Seconds that the tree had used before what is watched began.
    cpu_before: float = 0.0
    pids_limit: int | None = None
    #: The kernel's own count of memory, where there is one: it also kills.
    group: MemoryGroup | None = None
    now: int = 0
    peak: int = 0
    cpu: float = 0.0
    #: The processes of the tree, at the last look.
    pids: list[int] = dataclasses.field(default_factory=list)
    _orphans: list[int] = dataclasses.field(default_factory=list)
    _next_search: float | None = None
    _grew: bool = True
    #: The group holds all of the tree.
    _kernel_alone: bool = True
    _processes: int = 1
    _cost: float = 0.0

    @property
    def large(self) -> bool:
        """Whether a look takes so long that it does not belong on an event loop."""
        return self._processes > _FEW

    def look(self, clock: float, *, in_a_hurry: bool = False) -> StopCause | None:
        """Measure the tree and say which limit it has passed.

        Takes some 50 microseconds a process, and 1 ms a process when forks share memory near the limit. `in_a_hurry`:
        do nothing where the tree has become `large`.
        """
        started = time.monotonic()
        if self._next_search is None:
            self._next_search = clock + _ORPHAN_SEARCH
        elif clock >= self._next_search:
            self._orphans = _census.wearers(self.tag)
            self._next_search = clock + _ORPHAN_SEARCH
        below = memory.descendants(self.pid, most=_FEW if in_a_hurry else None)
        pids = list(dict.fromkeys([*below, *self._orphans]))
        self._processes = len(pids)
        if in_a_hurry and self.large:
            return None
        self.pids = pids
        cause = self._look_at_memory(pids) or self._look_at_use(pids)
        self._cost = time.monotonic() - started
        return cause

    def _look_at_memory(self, pids: list[int]) -> StopCause | None:
        over = self._count(pids) if self.group is None else self._count_by_group(self.group, pids)
        self.peak = max(self.peak, self.now)
        if not over:
            return None
        limit, peak = readable_size(self.memory_limit), readable_size(self.peak)
        return StopCause(reason=EndReason.MEMORY_LIMIT, message=f"passed its memory limit of {limit} (peak {peak})")

    def _count(self, pids: list[int]) -> bool:
        size = memory.own_size(pids, self.shared)
        if len(pids) > 1 and size > (self.memory_limit or self.peak):
            # The sum counts pages that forks share once for each of them.
            size = memory.exact_size(pids, self.shared)
        self._grew = size > self.now
        self.now = size
        return 0 < self.memory_limit < size

    def _count_by_group(self, group: MemoryGroup, pids: list[int]) -> bool:
        try:
            in_group = group.use().now
        except OSError:
            # Somebody removed the group from outside, which needs the task to be out of it.
            in_group = 0
        # Privileged code can leave its group, or raise the group's limit.
        outside = [pid for pid in pids if not group.holds(pid)]
        self.now = in_group + (memory.own_size(outside, self.shared) if outside else 0)
        self._kernel_alone = not outside
        return self.killed_by_kernel() or self.now > self.memory_limit + _KERNEL_SLACK

    def killed_by_kernel(self) -> bool:
        """Whether the kernel killed a process of the tree because the tree was at its limit."""
        if self.group is None:
            return False
        try:
            use = self.group.use()
        except OSError:
            return False
        if use.oom_kills:
            self.peak = use.peak
        return bool(use.oom_kills)

    def _look_at_use(self, pids: list[int]) -> StopCause | None:
        if self.cpu_limit is None and self.pids_limit is None:
            return None
        use = memory.processor_use(pids)
        # Orphans take their time with them when they end: the largest sum seen is the truest.
        self.cpu = max(self.cpu, use.seconds - self.cpu_before)
        if self.cpu_limit is not None and self.cpu > self.cpu_limit:
            text = f"used more than its {self.cpu_limit:g} s of processor time"
            return StopCause(reason=EndReason.CPU_TIME, message=text)
        if self.pids_limit is not None and use.threads > self.pids_limit:
            text = f"had {use.threads} processes and threads, its limit is {self.pids_limit}"
            return StopCause(reason=EndReason.PIDS, message=text)
        return None

    def pause(self) -> float:
        """Return the seconds until the next look is due."""
        # The first comes early, so that short tasks have a figure as well.
        if self._cost > _SHORTEST:
            # Looking must not become the main work.
            return min(_LONGEST, 4 * self._cost)
        pauses = [_LONGEST if self.now else _FIRST]
        if self.memory_limit and not (self.group is not None and self._kernel_alone):
            headroom = (self.memory_limit - self.now) / _FASTEST_GROWTH
            pauses.append(max(headroom, _SHORTEST if self._grew else _CALM))
        if self.cpu_limit is not None:
            pauses.append(max((self.cpu_limit - self.cpu) / usable_cores(), _CALM))
        if self.pids_limit is not None:
            pauses.append(_CALM)
        return min(pauses)
