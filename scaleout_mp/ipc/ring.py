"""Records in memory that a task shares with its supervisor: writing one takes no system call.

A ring of bytes, the same frames that would go through the socket. Task and supervisor each count the bytes that they
wrote or read since the beginning; the counts lie in the first page, the bytes behind it. What is in the ring is
delivered even if the task's process dies right after.

The supervisor looks into the ring every few milliseconds for as long as records come, and says in the ring until when
it certainly will. A task that writes after that time sends a BELL frame through the socket.

The supervisor trusts nothing in that memory: its own count is its own, and bytes are copied before they are read. The
seals keep the memory as long as it is, so that a read cannot meet a hole (SIGBUS). See memfd_create(2).
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
import time
from typing import Final

from scaleout_mp.errors import ProtocolViolation

#: Bytes of frames that fit.
CAPACITY: Final = 1 << 17

_HEADER: Final = mmap.PAGESIZE
_SIZE: Final = _HEADER + CAPACITY
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
#: These processors show stores to each other in the order in which they were made.
_ORDERED: Final = os.uname().machine in {"x86_64", "i686"}
# Places in the header as multiples of eight bytes; each has a cache line of its own.
_WRITTEN, _READ, _MAIL, _AWAKE, _HEARD = 0, 8, 16, 24, 32
_COUNTERS: Final = 40


class _Ring:
    def __init__(self, descriptor: int) -> None:
        self._map = mmap.mmap(descriptor, _SIZE)
        self._view = memoryview(self._map)
        self._counters = self._view[: _COUNTERS * 8].cast("Q")
        # Taking and releasing a lock orders the accesses to memory before and after, on every processor.
        self._barrier = threading.Lock()

    def close(self) -> None:
        """Unmap the memory."""
        self._counters.release()
        self._view.release()
        self._map.close()


class RingWriter(_Ring):
    """The task's side. Not safe for several threads at once: the channel has a lock for that."""

    def __init__(self) -> None:
        """Make the memory. Raises OSError where the task may not have it."""
        self.descriptor = os.memfd_create("scaleout-records", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.descriptor, _SIZE)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)
            super().__init__(self.descriptor)
        except BaseException:
            self.close_descriptor()
            raise
        self._written = 0
        self._seen_mail = 0
        self._rung = 0
        #: Whether the supervisor was going to look by itself when something was written last, and whether it had sent
        #: something then.
        self.awake = self.mail = False

    def close_descriptor(self) -> None:
        """Close it, once the supervisor has been sent its own; the mapping stays."""
        with contextlib.suppress(OSError):
            os.close(self.descriptor)

    def write(self, data: bytes) -> int:
        """Write as many bytes as fit; return how many. Sets `awake` and `mail`."""
        counters = self._counters
        written = self._written
        count = len(data)
        room = CAPACITY - (written - counters[_READ])
        if count > room:
            data, count = data[:room], room
        at = written % CAPACITY
        if at + count <= CAPACITY:
            start = _HEADER + at
            self._map[start : start + count] = data
        else:
            first = CAPACITY - at
            self._map[_HEADER + at :] = data[:first]
            self._map[_HEADER : _HEADER + count - first] = data[first:]
        if not _ORDERED:
            with self._barrier:
                pass
        self._written = counters[_WRITTEN] = written + count
        self.awake = time.monotonic_ns() < counters[_AWAKE]
        self.mail = counters[_MAIL] != self._seen_mail
        return count

    def needs_bell(self) -> bool:
        """Say whether to ring for what was written: nobody promised to look, and no bell is on its way."""
        if time.monotonic_ns() < self._counters[_AWAKE] or self._rung != self._counters[_HEARD]:
            return False
        self._rung += 1
        return True

    def has_mail(self) -> bool:
        """Say whether the supervisor has sent something through the socket since the last time this was asked."""
        mail = self._counters[_MAIL]
        if mail == self._seen_mail:
            return False
        self._seen_mail = mail
        return True


class RingReader(_Ring):
    """The supervisor's side."""

    def __init__(self, descriptor: int) -> None:
        """Take over the descriptor. Raises ProtocolViolation unless it is such memory; OSError."""
        try:
            _verify(descriptor)
            super().__init__(descriptor)
        finally:
            os.close(descriptor)
        self._read = 0
        self._mail = 0
        self._heard = 0

    def read(self, most: int) -> bytes:
        """Return up to `most` bytes that were not read yet, or none. Raises ProtocolViolation on an absurd count."""
        ready = self._counters[_WRITTEN] - self._read
        if not 0 <= ready <= CAPACITY:
            raise ProtocolViolation(f"{ready} bytes of records are said to be in memory for {CAPACITY}")
        with self._barrier:
            count = min(ready, most)
        start = self._read % CAPACITY
        first = min(count, CAPACITY - start)
        data = self._map[_HEADER + start : _HEADER + start + first] + self._map[_HEADER : _HEADER + count - first]
        self._read += count
        with self._barrier:
            self._counters[_READ] = self._read
        return data

    def heard_bell(self) -> None:
        """Have the task ring again for what it writes from now on. Look after this."""
        self._heard += 1
        self._counters[_HEARD] = self._heard

    def look_until(self, moment: float) -> None:
        """Promise to look once more after `moment`, in seconds of the monotonic clock."""
        self._counters[_AWAKE] = int(moment * 1e9)

    @property
    def filled(self) -> bool:
        """Whether something waits to be read."""
        return self._counters[_WRITTEN] != self._read

    def tell_of_mail(self) -> None:
        """Have the task look into its socket."""
        self._mail += 1
        with self._barrier:
            self._counters[_MAIL] = self._mail


def _verify(descriptor: int) -> None:
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ProtocolViolation(f"what should be memory for records is none: {error.strerror}") from error
    if seals & _SEALS != _SEALS or os.fstat(descriptor).st_size != _SIZE:
        raise ProtocolViolation("the memory for records is not sealed, or not as long as it must be")
