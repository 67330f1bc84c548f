"""A lock that a process holds on a file, as long as it lives."""

from __future__ import annotations

import fcntl
import os
import threading
from typing import Final

#: Locks of fcntl(2) hold between processes only; so what this process has locked is remembered here. But unlike those
#: of flock(2) they do not pass to what the user's program forks, which may outlive a client that was killed.
_held: Final[set[str]] = set()
#: Reentrant: a lock is released by the end of its owner, which a collection of garbage may bring about anywhere.
_changing: Final = threading.RLock()


class FileLockedError(OSError):
    """Another owner has the file; its text is in the arguments."""

    def __init__(self, text: str, *, here: bool) -> None:
        super().__init__(text)
        #: Whether it is one of this process.
        self.here = here


class FileLock:
    """One locked file, and the little text that lies in it."""

    def __init__(self, path: str) -> None:
        """Make and lock the file. Raises FileLockedError when somebody else has it, OSError when it cannot be made."""
        self._path = os.path.realpath(path)
        with _changing:
            if self._path in _held:
                raise FileLockedError(f"{os.getpid()}", here=True)
            self._fd = _locked(self._path)
            _held.add(self._path)

    def read(self) -> str:
        """Return what is in the file."""
        return os.pread(self._fd, 4096, 0).decode("utf-8", "replace").strip()

    def write(self, text: str) -> None:
        """Replace what is in the file, safe from a loss of power."""
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text.encode(), 0)
        os.fsync(self._fd)

    def release(self) -> None:
        """Unlock the file. Safe to call again."""
        with _changing:
            if self._path in _held and self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
                _held.discard(self._path)


def _locked(path: str) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        owner = os.pread(fd, 4096, 0).decode("utf-8", "replace").strip()
        os.close(fd)
        raise FileLockedError(owner, here=False) from error
    except BaseException:
        os.close(fd)
        raise
    return fd
