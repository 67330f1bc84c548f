"""Decides when a task has passed a limit that must be measured. It looks and says; others kill."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Final

from scaleout_mp.config.machine import usable_cores
from scaleout_mp.display import readable_size
from scaleout_mp.executor.report import StopCause
from scaleout_mp.sandbox import memory, tree
from scaleout_mp.task import EndReason

if TYPE_CHECKING:
    from scaleout_mp.sandbox.cgroup import MemoryGroup
    from scaleout_mp.sandbox.memory import OwnMemory

#: The fastest that memory is assumed to grow, bytes per second: with it a look is due before the limit can be reached.
_FASTEST_GROWTH: Final = 1e10
_SHORTEST: Final = 0.001
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
_census: Final = tree.Census()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Overcount:
    """By how much the sums over some processes were too large when they were last measured, in bytes."""

    pids: list[int] = dataclasses.field(default_factory=list)
    private: int = 0
    shared: int = 0
    #: Monotonic clock; measuring again before that would cost too much.
    good_until: float = 0.0


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
    _overcount: _Overcount = dataclasses.field(default_factory=_Overcount)
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
        self._cost = 0.0
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
        cause = self._look_at_memory(pids) or self._look_at_use(pids)
        self._cost += time.monotonic() - started
        return cause

    def _until_search(self) -> float:
        """Return the seconds until orphans are searched again: sooner where they may be growing towards the limit."""
        if not self.memory_limit or self.group is not None:
            return _ORPHAN_SEARCH
        return min(_ORPHAN_SEARCH, max(_CALM, (self.memory_limit - self.now) / _FASTEST_GROWTH / 4))

    def _look_at_memory(self, pids: list[int]) -> StopCause | None:
        over = self._count(pids) if self.group is None else self._count_by_group(self.group, pids)
        self.peak = max(self.peak, self.now)
        if not over:
            return None
        limit, peak = readable_size(self.memory_limit), readable_size(self.peak)
        return StopCause(reason=EndReason.MEMORY_LIMIT, message=f"passed its memory limit of {limit} (peak {peak})")

    def _count(self, pids: list[int]) -> bool:
        sum_ = memory.own_memory(pids, self.shared)
        size = sum_.total if len(pids) == 1 else self._without_overcount(pids, sum_)
        self._grew = size > self.now
        self.now = size
        return 0 < self.memory_limit < size

    def _without_overcount(self, pids: list[int], sum_: OwnMemory) -> int:
        """Return the size of several processes, of which the sum counts pages that they share once for each."""
        limit, over = self.memory_limit, self._overcount
        same = over.pids == pids
        if not limit:
            return self._measure(pids, sum_) if sum_.total > self.peak else sum_.total
        # In good time: what is in excess is then known when the limit is near, and measuring takes long there.
        if not same and sum_.total > limit / 2:
            return self._measure(pids, sum_)
        private = sum_.private - over.private
        if same and private > limit:
            # Without new processes there is no new sharing of private pages: it is at least so much.
            return private
        size = sum_.total - over.private - over.shared if same else sum_.total
        # Private pages that are written after a fork are in excess no more, which the sum does not show.
        stale = sum_.total > limit and time.monotonic() > over.good_until
        return self._measure(pids, sum_) if size > limit or stale else size

    def _measure(self, pids: list[int], sum_: OwnMemory) -> int:
        started = time.monotonic()
        exact = memory.exact_memory(pids, self.shared)
        ended = time.monotonic()
        self._overcount = _Overcount(
            pids=pids,
            private=max(0, sum_.private - exact.private),
            shared=max(0, sum_.shared - exact.shared),
            good_until=ended + 4 * (ended - started),
        )
        # Looking must not become the main work, but near a limit it has to go on.
        self._cost -= ended - started
        return exact.total

    def _count_by_group(self, group: MemoryGroup, pids: list[int]) -> bool:
        try:
            in_group = group.use().now
        except OSError:
            # Somebody removed the group from outside, which needs the task to be out of it.
            in_group = 0
        # Privileged code can leave its group, or raise the group's limit.
        outside = [pid for pid in pids if not group.holds(pid)]
        self.now = in_group + (memory.own_memory(outside, self.shared).total if outside else 0)
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
