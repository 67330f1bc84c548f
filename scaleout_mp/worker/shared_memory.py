"""What tasks leave in a /dev/shm of their own: nobody else can see it, so the template has to remove it."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Final

from scaleout_mp.sandbox.files import SHARED_MEMORY
from scaleout_mp.sandbox.removal import OPEN, Removal

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Seconds that one look may take; what is left then goes with the next one.
_MOST: Final = 0.05


class PrivateSharedMemory:
    """The /dev/shm of a template's mount namespace. One on a machine without such a namespace does nothing."""

    def __init__(self, *, private: bool = False) -> None:
        self._private = private
        self._kept: set[str] = set()

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Take what comes up inside for the template's, and leave it alone: user code is loaded there."""
        before = self._names()
        yield
        self._kept |= self._names() - before

    def _names(self) -> set[str]:
        if not self._private:
            return set()
        try:
            return set(os.listdir(SHARED_MEMORY))
        except OSError:
            return set()

    def clear(self) -> None:
        """Remove what tasks left. Called while no task runs: semaphores and segments of killed ones, for example."""
        names = self._names() - self._kept
        if names:
            # It is a courtesy to the next task: the namespace takes all of it along in the end.
            with contextlib.suppress(OSError):
                self._remove(names)

    @staticmethod
    def _remove(names: set[str]) -> None:
        deadline = time.monotonic() + _MOST
        removal = Removal(give_up=lambda: time.monotonic() > deadline)
        folder = os.open(SHARED_MEMORY, OPEN)
        try:
            for name in names:
                if removal.give_up():
                    return
                removal.remove(name, folder)
        finally:
            os.close(folder)
