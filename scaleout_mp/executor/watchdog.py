"""Decides when a task has passed a limit that must be measured. It looks and says; others kill."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Final

from scaleout_mp.config.machine import usable_cores
from scaleout_mp.display import readable_size
from scaleout_mp.executor.report import StopCause
from scaleout_mp.sandbox import memory, tree
from scaleout_mp.sandbox.tree_memory import CALM, FASTEST_GROWTH, TreeMemory
from scaleout_mp.task import EndReason

if TYPE_CHECKING:
    from scaleout_mp.sandbox.cgroup import MemoryGroup

_SHORTEST: Final = 0.001
_LONGEST: Final = 0.25
_FIRST: Final = 0.03
#: Between two searches for orphans of the task, seconds.
_ORPHAN_SEARCH: Final = 0.1
#: Bytes by which the kernel's counters may be behind its own bound.
_KERNEL_SLACK: Final = 1 << 22
#: Processes that are looked at between two events of the loop.
_FEW: Final = 8
#: One search for the orphans of all tasks.
_census: Final = tree.Census()


@dataclasses.dataclass(kw_only=True)
class TreeWatch:
    """Follows what one task's tree uses. Sizes in bytes, times in seconds."""

    pid: int
    tag: int
    memory: TreeMemory = dataclasses.field(default_factory=TreeMemory)
    #: Somebody else counts the memory and notes it here.
    handed_over: bool = False
    cpu_limit: float | None = None
    #: Seconds that the tree had used before what is watched began.
    cpu_before: float = 0.0
    pids_limit: int | None = None
    #: The kernel's own count of memory, where there is one: it also kills.
    group: MemoryGroup | None = None
    cpu: float = 0.0
    #: The processes of the tree, at the last look.
    pids: list[int] = dataclasses.field(default_factory=list)
    _orphans: list[int] = dataclasses.field(default_factory=list)
    _next_search: float | None = None
    #: The group holds all of the tree.
    _kernel_alone: bool = True
    _processes: int = 1
    _cost: float = 0.0

    @property
    def to_hand_over(self) -> bool:
        """Whether its memory has to be counted, by somebody who is never late if there is one."""
        return bool(self.memory.limit) and self.group is None and not self.handed_over

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
            self._next_search = clock + self._until_search()
        elif clock >= self._next_search:
            pause = self._until_search()
            self._orphans = _census.wearers(self.tag, seconds=pause / 2)
            self._next_search = clock + pause
        below = memory.descendants(self.pid, most=_FEW if in_a_hurry else None)
        pids = list(dict.fromkeys([*below, *self._orphans]))
        self._processes = len(pids)
        if in_a_hurry and self.large:
            return None
        self.pids = pids
        cause = (None if self.handed_over else self._look_at_memory(pids)) or self._look_at_use(pids)
        # Measuring must not become the main work, but near a limit it has to go on: it has its own pace.
        measuring = 0.0 if self.handed_over else self.memory.measuring
        self._cost = time.monotonic() - started - measuring
        return cause

    def _until_search(self) -> float:
        """Return the seconds until orphans are searched again: sooner where they may be growing towards the limit."""
        if not self.memory.limit or self.group is not None or self.handed_over:
            return _ORPHAN_SEARCH
        return min(_ORPHAN_SEARCH, max(CALM, self.memory.headroom / FASTEST_GROWTH / 4))

    def _look_at_memory(self, pids: list[int]) -> StopCause | None:
        over = self.memory.look(pids) if self.group is None else self._count_by_group(self.group, pids)
        return self.breach() if over else None

    def breach(self) -> StopCause:
        """Return what it means that the tree is over its limit of memory."""
        limit, peak = readable_size(self.memory.limit), readable_size(self.memory.peak)
        return StopCause(reason=EndReason.MEMORY_LIMIT, message=f"passed its memory limit of {limit} (peak {peak})")

    def _count_by_group(self, group: MemoryGroup, pids: list[int]) -> bool:
        try:
            in_group = group.use().now
        except OSError:
            # Somebody removed the group from outside, which needs the task to be out of it.
            in_group = 0
        # Privileged code can leave its group, or raise the group's limit.
        outside = [pid for pid in pids if not group.holds(pid)]
        seen = self.memory
        seen.now = in_group + (memory.own_memory(outside, seen.shared).total if outside else 0)
        seen.peak = max(seen.peak, seen.now)
        self._kernel_alone = not outside
        return self.killed_by_kernel() or seen.now > seen.limit + _KERNEL_SLACK

    def killed_by_kernel(self) -> bool:
        """Whether the kernel killed a process of the tree because the tree was at its limit."""
        if self.group is None:
            return False
        try:
            use = self.group.use()
        except OSError:
            return False
        if use.oom_kills:
            self.memory.peak = use.peak
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
        pauses = [_LONGEST if self.memory.now else _FIRST]
        if self.memory.limit and not self.handed_over and not (self.group is not None and self._kernel_alone):
            pauses.append(self.memory.pause(_SHORTEST))
        if self.cpu_limit is not None:
            pauses.append(max((self.cpu_limit - self.cpu) / usable_cores(), CALM))
        if self.pids_limit is not None:
            pauses.append(CALM)
        return min(pauses)
