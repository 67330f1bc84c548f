"""Memory for large arguments that is used again: a copy into pages that are there already costs a third.

Whoever gets the descriptor can only read: the one writable map is that of the program that lends. The borrower says
when nothing of it refers to the memory any more; until then, and if it never does, nothing else is written there.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.ipc.segments import ALIGNMENT
from scaleout_mp.model.numpy_used import np

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Bytes from which on lending pays.
LEND_FROM: Final = 1 << 20
#: Bytes that are kept for later, of all borrowers together, and seconds for which they are.
_MOST_KEPT: Final = 512 << 20
_KEEP_SECONDS: Final = 60.0
#: No new writable map, while ours goes on to work (fcntl(2), since Linux 5.1; the fcntl module does not have it).
_F_SEAL_FUTURE_WRITE: Final = 0x10


class LentMemory:
    """One piece of memory, of fixed size."""

    def __init__(self, size: int) -> None:
        """Make it. Raises OSError, also where the kernel cannot keep others from writing."""
        self.size = size
        #: On the monotonic clock.
        self.used_at = 0.0
        descriptor = os.memfd_create("scaleout-arguments", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, size)
            self._map = mmap.mmap(descriptor, size)
            # It cannot shrink either: we would die of SIGBUS.
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def fileno(self) -> int:
        """Return its descriptor, which stays ours."""
        return self._descriptor

    def fill(self, segments: Sequence[bytes | memoryview]) -> list[int]:
        """Write segments, each at a multiple of the alignment, and return their sizes."""
        sizes = []
        place = np.frombuffer(self._map, np.uint8)
        start = 0
        for segment in segments:
            data = np.frombuffer(segment, np.uint8) if len(segment) else np.empty(0, np.uint8)
            # Unlike a slice of a memoryview, this lets other threads run.
            np.copyto(place[start : start + data.size], data)
            sizes.append(data.size)
            start += data.size + -data.size % ALIGNMENT
        return sizes

    def close(self) -> None:
        """Give it up. Borrowers keep what they have of it."""
        os.close(self._descriptor)
        self._map.close()


class Lender:
    """Keeps what came back, for the same borrowers: they may see what they were lent before. From any thread."""

    def __init__(self, *, keep_seconds: float = _KEEP_SECONDS) -> None:
        """Keep what nobody was lent for so long."""
        self._keep_seconds = keep_seconds
        self._timer: threading.Timer | None = None
        self._kept: dict[str, list[LentMemory]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def lend(self, borrower: str, size: int) -> LentMemory | None:
        """Return memory for at least `size` bytes; None where there is none to be had."""
        with self._lock:
            kept = self._kept.get(borrower, [])
            # Much too large a piece is rather left for what needs it.
            fitting = [memory for memory in kept if size <= memory.size <= 4 * size]
            if fitting:
                memory = min(fitting, key=lambda memory: memory.size)
                kept.remove(memory)
                return memory
        try:
            return LentMemory(size + -size % LEND_FROM)
        except OSError:
            return None

    def take_back(self, borrower: str, memory: LentMemory) -> None:
        """Keep memory to which nobody refers any more."""
        memory.used_at = time.monotonic()
        with self._lock:
            room = _MOST_KEPT - sum(each.size for kept in self._kept.values() for each in kept)
            if not self._closed and memory.size <= room:
                self._kept.setdefault(borrower, []).append(memory)
                self._trim_later()
                return
        memory.close()

    def _trim_later(self) -> None:
        if self._timer is None:
            self._timer = threading.Timer(self._keep_seconds, self._trim)
            self._timer.daemon = True
            self._timer.start()

    def _trim(self) -> None:
        """Give up what was not used for long."""
        oldest = time.monotonic() - self._keep_seconds
        with self._lock:
            self._timer = None
            gone = [memory for kept in self._kept.values() for memory in kept if memory.used_at <= oldest]
            left = {name: [each for each in kept if each not in gone] for name, kept in self._kept.items()}
            self._kept = {name: kept for name, kept in left.items() if kept}
            if self._kept and not self._closed:
                self._trim_later()
        for memory in gone:
            memory.close()

    def close(self) -> None:
        """Give up all of it."""
        with self._lock:
            kept, self._kept, self._closed = self._kept, {}, True
            timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
            timer.join()
        for memories in kept.values():
            for memory in memories:
                memory.close()


#: How often this process was forked by Python.
_forks = 0


def _note_fork() -> None:
    global _forks  # noqa: PLW0603 - a fact about the process
    _forks += 1


# It sees those that waitid(2) does not find: a child that left one of its own behind is gone.
os.register_at_fork(after_in_parent=_note_fork)


class Borrowed:
    """What a borrower has of it."""

    def __init__(self, descriptor: int) -> None:
        """Map it, so that what is written stays in this process. Takes over the descriptor."""
        self._forks = _forks
        try:
            self._map = mmap.mmap(descriptor, os.fstat(descriptor).st_size, access=mmap.ACCESS_COPY)
        finally:
            os.close(descriptor)

    def segments(self, sizes: Sequence[Any]) -> list[memoryview]:
        """Return the segments as writable views."""
        view = memoryview(self._map)
        segments = []
        start = 0
        for size in sizes:
            segments.append(view[start : start + size])
            start += size + -size % ALIGNMENT
        return segments

    def let_go(self) -> bool:
        """Return whether nothing refers to it any more, here or below this process; then it is unmapped."""
        if self._forks != _forks:
            return False
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            pass
        else:
            # Pages that it has not written to itself would change under it.
            return False
        try:
            self._map.close()
        except BufferError:
            return False
        return True
