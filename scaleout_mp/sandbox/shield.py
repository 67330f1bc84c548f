"""Keeps what a process holds, tokens above all, from the other processes of its user, which its tasks are.

A process that is not "dumpable" cannot be debugged, and what it has in memory, in its environment and behind its
descriptors cannot be read under /proc, unless by who has CAP_SYS_PTRACE. It writes no core file either. Programs that
it starts are as before; forks of it are not. Facts: PR_SET_DUMPABLE in prctl(2), proc(5).
"""

from __future__ import annotations

import threading
from typing import Final

from scaleout_mp.sandbox import process

_lock: Final = threading.Lock()


class Shield:
    """One wish for the process to be shielded; it is as long as there is one."""

    _held = 0
    #: What the process was before the first.
    _before = True

    def __init__(self) -> None:
        self._on = False

    def put_on(self) -> None:
        """Shield this process from now on. A second call does nothing."""
        with _lock:
            if self._on:
                return
            if Shield._held == 0:
                Shield._before = process.is_dumpable()
                process.set_dumpable(False)
            Shield._held += 1
            self._on = True

    def take_off(self) -> None:
        """Give the wish up; after the last one the process is what it was before."""
        with _lock:
            if not self._on:
                return
            self._on = False
            Shield._held -= 1
            if Shield._held == 0 and Shield._before:
                process.set_dumpable(True)
