"""A cgroup of version 2 around a template and everything below it, where one can be made; it needs no controller.

The kernel can hold all of it still at once, and what is held still forks nothing: one search then finds everybody, also
those that fork and leave faster than any search. A process joins when it is forked, so tasks pay nothing for it; each
task moving to a group of its own would cost it up to 10 ms, for which the kernel waits until all processors were idle.

Facts: Documentation/admin-guide/cgroup-v2.rst (cgroup.freeze since Linux 5.2; what is frozen dies of SIGKILL).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import signal
import time

# As `threading.Lock`, without the module: the guardian stays small.
from _thread import allocate_lock
from typing import TYPE_CHECKING, Final, Self

from scaleout_mp.sandbox import process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Seconds for all processes to stand still; who hangs in the kernel does not, and does not fork either.
_STANDSTILL: Final = 0.05
_LOOK_EVERY: Final = 0.0005
#: Seconds that a group may stay busy after its last process is gone.
_BUSY: Final = 0.5


class TreeGroup:
    """A folder of the kernel's. May be used from several threads; several objects for one folder do not know it."""

    #: As reports name it.
    NAME: Final = "cgroup of its tree"

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._lock = allocate_lock()

    @property
    def folder(self) -> str:
        """Its path."""
        return self._folder

    @classmethod
    def make(cls, folder: str) -> Self:
        """Make the folder. Raises OSError when there is no group of version 2 with what is needed."""
        os.mkdir(folder)
        group = cls(folder)
        if not os.path.exists(f"{folder}/cgroup.freeze"):
            group.remove()
            raise OSError(errno.ENOSYS, f"{folder} cannot be held still")
        return group

    def below(self) -> TreeGroup:
        """Make a group below this one. Raises OSError."""
        return self.make(f"{self._folder}/template-{secrets.token_hex(4)}")

    @property
    def around(self) -> TreeGroup:
        """The group that this one was made below."""
        return TreeGroup(os.path.dirname(self._folder))

    def join(self) -> None:
        """Put the calling process in, and with it what it forks from now on. Raises OSError."""
        process.write_file(f"{self._folder}/cgroup.procs", b"0")

    def members(self) -> list[int]:
        """Return the pids of all living processes in this group and below it."""
        pids = []
        for folder, _, _ in os.walk(self._folder):
            # A group below may be removed meanwhile; one with threads apart has no list.
            with contextlib.suppress(OSError):
                pids += [int(pid) for pid in process.read_file(f"{folder}/cgroup.procs").split()]
        # Of another pid namespace: 0.
        return [pid for pid in pids if pid]

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Hold all processes of the group still for the block. Raises OSError."""
        with self._lock:
            process.write_file(f"{self._folder}/cgroup.freeze", b"1")
            try:
                deadline = time.monotonic() + _STANDSTILL
                while (
                    b"frozen 1" not in process.read_file(f"{self._folder}/cgroup.events")
                    and time.monotonic() < deadline
                ):
                    time.sleep(_LOOK_EVERY)
                yield
            finally:
                process.write_file(f"{self._folder}/cgroup.freeze", b"0")

    def kill(self, doomed: Callable[[int], bool]) -> list[int]:
        """Kill those for whom `doomed`, which gets a pid, is true, while all stand still; return them.

        Nothing happens where the group is gone. In a group that contains the caller it would never return.
        """
        killed = []
        with contextlib.suppress(OSError), self.still():
            for pid in self.members():
                # Who stands still keeps its pid: nobody can reap it but its parent, which is in here, or the caller.
                if doomed(pid):
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGKILL)
                        killed.append(pid)
        return killed

    def thaw(self) -> None:
        """Have the group, and each below it, go on: code that may use all of a user's files can hold them still."""
        with self._lock:
            for folder, _, _ in os.walk(self._folder):
                # It may be gone.
                with contextlib.suppress(OSError):
                    process.write_file(f"{folder}/cgroup.freeze", b"0")

    def remove(self) -> None:
        """Remove the folder and those below it. Raises OSError when something is in there."""
        deadline = time.monotonic() + _BUSY
        while True:
            try:
                for folder, _, _ in os.walk(self._folder, topdown=False):
                    with contextlib.suppress(FileNotFoundError):
                        os.rmdir(folder)
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.002)
            else:
                return
