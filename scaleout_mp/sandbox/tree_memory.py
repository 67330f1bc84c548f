"""Counts what the processes of one task have made their own, and says when that is more than their limit."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Final

from scaleout_mp.sandbox import memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from scaleout_mp.sandbox.memory import OwnMemory

#: The fastest that memory is assumed to grow, bytes per second: with it a look is due before the limit can be reached.
FASTEST_GROWTH: Final = 2e10
#: A task near its limit that does not grow is looked at this seldom, seconds.
CALM: Final = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Overcount:
    """By how much the sums over some processes were too large when they were last measured, in bytes."""

    pids: list[int] = dataclasses.field(default_factory=list)
    private: int = 0
    shared: int = 0
    #: Monotonic clock; measuring again before that would cost too much.
    good_until: float = 0.0


@dataclasses.dataclass(kw_only=True)
class TreeMemory:
    """Follows the memory of one tree. Sizes in bytes, times in seconds."""

    #: 0: no limit, only the peak is followed.
    limit: int = 0
    #: Bytes of models that were handed over: shared pages that are not the task's doing.
    shared: int = 0
    #: Keeps the processes from growing while their pages are measured because they may be over the limit, which takes
    #: some 10 ms a process. None: nothing can.
    hold: Callable[[list[int]], None] | None = None
    now: int = 0
    peak: int = 0
    #: Seconds that the last look spent on measuring pages.
    measuring: float = 0.0
    _sum: int = 0
    #: Monotonic clock.
    _grew_at: float = dataclasses.field(default_factory=time.monotonic)
    _overcount: _Overcount = dataclasses.field(default_factory=_Overcount)

    @property
    def headroom(self) -> int:
        """Bytes until the limit."""
        return self.limit - self.now

    def pause(self, shortest: float) -> float:
        """Return the seconds until the limit could be reached, at least `shortest`."""
        # One look without growth says little: it may just have had no processor.
        still = min(CALM, time.monotonic() - self._grew_at)
        return max(self.headroom / FASTEST_GROWTH, shortest, still)

    def look(self, pids: list[int]) -> bool:
        """Count; return whether the tree is over its limit."""
        self.measuring = 0.0
        sum_ = memory.own_memory(pids, self.shared)
        size = sum_.total if len(pids) == 1 else self._without_overcount(pids, sum_)
        # By the sum: measuring makes the size smaller, which says nothing about growth.
        if sum_.total > self._sum:
            self._grew_at = time.monotonic()
        self._sum = sum_.total
        self.now = size
        self.peak = max(self.peak, size)
        return 0 < self.limit < size

    def _without_overcount(self, pids: list[int], sum_: OwnMemory) -> int:
        """Return the size of several processes, of which the sum counts pages that they share once for each."""
        limit, over = self.limit, self._overcount
        same = over.pids == pids
        if not limit:
            return self._measure(pids, sum_) if sum_.total > self.peak else sum_.total
        stale = time.monotonic() > over.good_until
        if not same and sum_.total > (limit / 2 if self.hold is None else limit):
            # Without a hold in good time: what is in excess is then known when the limit is near.
            return self._measure(pids, sum_, held=stale)
        private = sum_.private - over.private
        if same and private > limit:
            # Without new processes there is no new sharing of private pages: it is at least so much.
            return private
        size = sum_.total - over.private - over.shared if same else sum_.total
        if size > limit:
            return self._measure(pids, sum_, held=True)
        # Private pages that are written after a fork are in excess no more, which the sum does not show.
        return self._measure(pids, sum_) if sum_.total > limit and stale else size

    def _measure(self, pids: list[int], sum_: OwnMemory, *, held: bool = False) -> int:
        started = time.monotonic()
        if held and self.hold is not None:
            self.hold(pids)
        exact = memory.exact_memory(pids, self.shared)
        ended = time.monotonic()
        self._overcount = _Overcount(
            pids=pids,
            private=max(0, sum_.private - exact.private),
            shared=max(0, sum_.shared - exact.shared),
            good_until=ended + 4 * (ended - started),
        )
        self.measuring += ended - started
        return exact.total
