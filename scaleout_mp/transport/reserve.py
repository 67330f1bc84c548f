"""Room on a disk that is kept for what must be written when all other room is gone.

A write-ahead log that has filled the disk can neither grow nor be brought into its database, which would have to grow
for it: nothing could be noted any more, not even what makes room. So a little is held back, and given up then.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

#: Bytes; more than the log holds before it is brought into the database.
SIZE: Final = 2 << 20
#: Seconds after which it is looked whether there is room again.
_LOOK_AGAIN: Final = 2.0


class Reserve:
    """A file that is nothing but room. Every method blocks."""

    def __init__(self, path: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        #: When it was given up for want of room; None while it was not.
        self._given_at: float | None = None

    @property
    def given(self) -> bool:
        """Whether it was given up, and there is no room yet to take it back."""
        if self._given_at is not None and self._clock() - self._given_at >= _LOOK_AGAIN:
            self.take()
        return self._given_at is not None

    def take(self) -> None:
        """Hold the room, where there is that much and as much again."""
        if self._given_at is not None:
            self._given_at = self._clock()
        with contextlib.suppress(OSError):
            disk = os.statvfs(os.path.dirname(self._path))
            if not os.path.exists(self._path) and disk.f_bavail * disk.f_frsize < 2 * SIZE:
                return
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.posix_fallocate(fd, 0, SIZE)
            except OSError:
                os.unlink(self._path)
                raise
            finally:
                os.close(fd)
            self._given_at = None

    def give(self) -> bool:
        """Give the room up; return whether there was any."""
        try:
            os.unlink(self._path)
        except OSError:
            return False
        self._given_at = self._clock()
        return True

    def close(self) -> None:
        """Give the room back at the end."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)
