"""Locks on files that may be removed by who has the lock."""

from __future__ import annotations

import contextlib
import fcntl
import os


def lock(path: str, kind: int) -> int:
    """Return a descriptor with a lock of flock(2) on a file, made when it is missing.

    Raises BlockingIOError, when it is not to wait, and OSError.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, kind)
            # Who had it before may have removed the file, while this one waited for it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
