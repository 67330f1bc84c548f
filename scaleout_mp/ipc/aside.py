"""Closing what a task handed over, without waiting for it.

The close of a socket may wait for its peer (SO_LINGER), that of a file for a file system that a process serves: whoever
made them says how long. Threads wait in the place of the event loop.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import struct
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

_NO_LINGER: Final = struct.pack("ii", 0, 0)


def is_memory(descriptor: int) -> bool:
    """Say whether a descriptor is anonymous memory, which the kernel closes at once; asks nobody but the kernel."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


def close_aside(descriptors: Iterable[int]) -> None:
    """Close descriptors on a thread, however long that takes."""
    waiting = list(descriptors)
    if waiting:
        # Not one of a pool: it may be held up for hours. A task gets no further than one.
        threading.Thread(target=_close, args=(waiting,), name="scaleout-close", daemon=True).start()


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                with socket.socket(fileno=os.dup(descriptor)) as sock:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        with contextlib.suppress(OSError):
            os.close(descriptor)
