"""Decides when a task has passed its memory limit. It looks and says; others kill."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from scaleout_mp.sandbox import memory, tree

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
_ORPHAN_SEARCH: Final = 0.5


@dataclasses.dataclass(kw_only=True)
class MemoryWatch:
    """Follows the memory of one task's tree."""

    pid: int
    tag: int
    #: Bytes; 0: no limit, only the peak is followed.
    limit: int
    #: Bytes of models that were handed over: shared pages that are not the task's doing.
    shared: int
    #: The kernel's own count, where there is one: it also kills.
    group: MemoryGroup | None = None
    now: int = 0
    peak: int = 0
    _orphans: list[int] = dataclasses.field(default_factory=list)
    _next_search: float | None = None
    _grew: bool = True

    def look(self, clock: float) -> bool:
        """Measure the tree; True when it is over its limit. Some 50 microseconds, 1 ms a process near the limit."""
        if self._next_search is None:
            self._next_search = clock + _ORPHAN_SEARCH
        elif clock >= self._next_search:
            self._orphans = tree.tagged(self.tag)
            self._next_search = clock + _ORPHAN_SEARCH
        pids = list(dict.fromkeys([*memory.descendants(self.pid), *self._orphans]))
        size = memory.own_size(pids, self.shared)
        if self.group is None and self.limit and size > self.limit and len(pids) > 1:
            # The sum counts pages that forks share once for each of them.
            size = memory.exact_size(pids, self.shared)
        self._grew = size > self.now
        self.now = size
        self.peak = max(self.peak, size)
        if self.group is not None:
            # It counts what the kernel charges to the task; our sum has pages in it that the template paid for.
            return self.killed_by_kernel()
        return bool(self.limit) and size > self.limit

    def killed_by_kernel(self) -> bool:
        """Whether the kernel killed a process of the tree because the tree was at its limit."""
        if self.group is None:
            return False
        try:
            use = self.group.use()
        except OSError:
            # Somebody removed the group from outside, which needs the task to be out of it.
            return False
        if use.oom_kills:
            self.peak = use.peak
        return bool(use.oom_kills)

    def pause(self) -> float:
        """Return the seconds until the next look is due."""
        # The first comes early, so that short tasks have a figure as well.
        longest = _LONGEST if self.now else _FIRST
        if not self.limit or self.group is not None:
            return longest
        headroom = (self.limit - self.now) / _FASTEST_GROWTH
        shortest = _SHORTEST if self._grew else _CALM
        return min(max(headroom, shortest), longest)
