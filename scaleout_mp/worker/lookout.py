"""Looks at trees that are near their limit of memory, as often as it takes, and kills one that passes it.

Part of the guardian, since that has nothing else to do and no thread beside it: a look of the supervisor's is late
whenever the event loop or the program around it is busy, and memory grows by megabytes in each millisecond.
"""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, Final

from scaleout_mp.errors import ChannelError
from scaleout_mp.ipc import frames
from scaleout_mp.ipc.channel import ChildChannel
from scaleout_mp.ipc.frames import Kind
from scaleout_mp.sandbox import memory, process, tree
from scaleout_mp.sandbox.tree_memory import TreeMemory

if TYPE_CHECKING:
    import socket

#: Seconds between two looks: a process touches a megabyte in that time.
_SHORTEST: Final = 0.0005
_LONGEST: Final = 0.25
#: Looks at a tree of hundreds of processes, which take longer than this, may take a fifth of the time.
_DEAR: Final = 0.01
#: Seconds between two messages about one tree, and by how many bytes its peak must have grown for one.
_NEWS: Final = 0.05
_NEWS_SIZE: Final = 1 << 20


class _Tree:
    """One tree that is looked at."""

    def __init__(self, pid: int, tag: int, limit: int, shared: int) -> None:
        self.pid = pid
        self.tag = tag
        self.memory = TreeMemory(limit=limit, shared=shared, hold=self._hold)
        #: Monotonic clock.
        self.due = 0.0
        self.over = False
        self._told = 0
        self._tell_from = 0.0
        self._stopped: list[int] = []

    def _hold(self, pids: list[int]) -> None:
        self._stopped = tree.stop_tagged(pids, self.tag)

    def _release(self) -> None:
        for pid in self._stopped:
            tree.signal_process(pid, self.tag, signal.SIGCONT)
        self._stopped.clear()

    def _kill(self, pids: list[int]) -> None:
        for pid in pids:
            if not tree.is_tracker(pid):
                tree.signal_process(pid, self.tag, signal.SIGKILL)

    def look(self, adopted: list[int], channel: ChildChannel) -> None:
        """Count, and kill at once when it is over the limit; `adopted` are orphans, of this tree or others."""
        started, worked = time.monotonic(), time.process_time()
        # Where nobody is any more, the number may be another's.
        roots = [pid for pid in dict.fromkeys([self.pid, *adopted]) if tree.wears(pid, self.tag)]
        pids = [pid for root in roots for pid in memory.descendants(root)]
        try:
            over = self.memory.look(pids)
            if over and not self.over:
                # Before the kill: whoever hears of the death must be able to know why.
                channel.send(frames.encode(Kind.BREACH, self.tag, self.memory.now))
            self.over = self.over or over
            if self.over:
                self._kill(pids)
        finally:
            self._release()
        now = time.monotonic()
        if self.memory.peak >= self._told + _NEWS_SIZE and now > self._tell_from and not self.over:
            self._told, self._tell_from = self.memory.peak, now + _NEWS
            channel.send(frames.encode(Kind.USE, self.tag, self.memory.now, self.memory.peak))
        # Its own work: while this process waits for a processor, the tree may have one, and grow.
        cost = time.process_time() - worked - self.memory.measuring
        if cost > _DEAR:
            self.due = now + min(_LONGEST, 4 * cost)
        else:
            # It may have grown since the count began; half of the time of one processor is all that a look may take.
            self.due = max(started + self.memory.pause(_SHORTEST), now + max(_SHORTEST, cost))


class Lookout:
    """The guardian's part in the watch over memory."""

    def __init__(self, sock: socket.socket) -> None:
        """Take orders from the other end of `sock`."""
        self._channel = ChildChannel(sock)
        self._trees: dict[int, _Tree] = {}

    def receive(self) -> bool:
        """Take the orders that are there; False once the supervisor is gone."""
        try:
            self._receive()
        except ChannelError:
            return False
        return True

    def _receive(self) -> None:
        while (frame := self._channel.receive_ready()) is not None:
            if frame.kind is Kind.WATCH:
                pid, tag, limit, shared = frame.fields
                self._trees[tag] = _Tree(pid, tag, limit, shared)
            elif frame.kind is Kind.FORGET:
                self._trees.pop(frame.fields[0], None)

    def pause(self) -> float | None:
        """Return the seconds until a look is due; None: none is."""
        if not self._trees:
            return None
        return max(0.0, min(each.due for each in self._trees.values()) - time.monotonic())

    def look(self, adopter: int) -> bool:
        """Look at every tree whose turn it is; False once the supervisor is gone.

        `adopter` is the process that adopts the orphans of tasks.
        """
        now = time.monotonic()
        due = [each for each in self._trees.values() if each.due <= now]
        try:
            # The list of its children is read once for all.
            adopted = process.children_of(adopter) if due else []
            for each in due:
                each.look(adopted, self._channel)
        except ChannelError:
            return False
        return True
