"""Room on a disk that is kept for what must be written when all other room is gone.

A write-ahead log that has filled the disk can neither grow nor be brought into its database, which would have to grow
for it: nothing could be noted any more, not even what makes room. So a little is held back, and given up then. On a
small disk it is less, and so the log has to be smaller, too: its owner asks for `size`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

#: Bytes, where there is room for it and as much again.
SIZE: Final = 2 << 20
#: Bytes, the least that is of use: some pages of a log.
LEAST: Final = 32 << 10
#: Seconds after which it is looked whether there is room again.
_LOOK_AGAIN: Final = 2.0
#: Seconds after which it is looked whether more can be held.
_LOOK_FOR_MORE: Final = 30.0
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class Reserve:
    """A file that is nothing but room. Every method blocks."""

    def __init__(self, path: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        #: Bytes that are, or were, held.
        self.size = LEAST
        #: Whether it was given up for want of room, or was not to be had.
        self._given = False
        self._looked_at = clock()

    @property
    def given(self) -> bool:
        """Whether it was given up or never to be had, and there is no room yet to take it."""
        wait = _LOOK_AGAIN if self._given else _LOOK_FOR_MORE
        if (self._given or self.size < SIZE) and self._clock() - self._looked_at >= wait:
            self.take()
        return self._given

    def take(self) -> None:
        """Hold the room, or less where there is not that much and as much again; but not less than was given up."""
        self._looked_at = self._clock()
        size, least = SIZE, self.size if self._given else LEAST
        while size >= least:
            try:
                if self._hold(size):
                    self.size, self._given = size, False
                    return
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    # A folder that is not there, a file system that does not do this: all goes on without.
                    self.size, self._given = SIZE, False
                    return
            size //= 2
        self.size, self._given = least, True

    def _hold(self, size: int) -> bool:
        disk = os.statvfs(os.path.dirname(self._path))
        held = 0
        with contextlib.suppress(FileNotFoundError):
            # What a killed client left.
            held = os.stat(self._path).st_blocks * 512
        if held < size and disk.f_bavail * disk.f_frsize + held < 2 * size:
            return False
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(fd, size)
            os.posix_fallocate(fd, 0, size)
        except OSError:
            os.unlink(self._path)
            raise
        finally:
            os.close(fd)
        return True

    def give(self) -> bool:
        """Give the room up; return whether there was any."""
        try:
            os.unlink(self._path)
        except OSError:
            return False
        self._given, self._looked_at = True, self._clock()
        return True

    def close(self) -> None:
        """Give the room back at the end."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)
