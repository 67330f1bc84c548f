"""What is killed: a task that holds memory, has two children of its own, and does not want to go."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import tempfile
import time
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SIZE = 1 << 30
#: Seconds that whoever is left may take to be gone after the first process.
_LATE = 1.0
#: Seconds that a task may take to tell.
_NEWS = 60.0


def hoard(told: str, *, ignore_term: bool, size: int = SIZE) -> None:
    """Touch `size` bytes, fork twice, write the pids and when it began into the FIFO `told`, and wait for ever."""
    started = time.monotonic()
    if ignore_term:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    held = np.ones(size, dtype=np.uint8)
    pids = [os.getpid(), _sleeper(), _sleeper()]
    with open(told, "w", encoding="utf-8") as file:
        json.dump({"started": started, "pids": pids}, file)
    while held[0]:
        signal.pause()


def _sleeper() -> int:
    pid = os.fork()
    if pid == 0:
        _sleep()
    return pid


def _sleep() -> NoReturn:
    while True:
        time.sleep(60)


@contextlib.contextmanager
def place_to_tell() -> Iterator[str]:
    """Give the path of a FIFO."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "told")
        os.mkfifo(path)
        yield path


def listen(told: str) -> dict[str, Any]:
    """Wait for what a hoarder tells. Raises TimeoutError."""
    # Not blocking: a pool may lose the task before it opens the other end.
    with open(os.open(told, os.O_RDONLY | os.O_NONBLOCK), encoding="utf-8") as file:
        if not select.select([file], [], [], _NEWS)[0]:
            raise TimeoutError("the task told nothing")
        os.set_blocking(file.fileno(), True)
        found: dict[str, Any] = json.load(file)
        return found


def warm() -> None:
    """Do nothing: who calls it has imported this module."""


class Victims:
    """A hoarder and its children, watched by pidfd."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._watched = {os.pidfd_open(pid): pid for pid in pids}
        self._first = next(iter(self._watched))

    def first_gone(self) -> float:
        """Wait until the hoarder itself has ended, and return when."""
        select.select([self._first], [], [])
        return time.monotonic()

    def all_gone(self) -> float:
        """Wait until all have ended, and return when."""
        for descriptor in self._watched:
            select.select([descriptor], [], [])
        return time.monotonic()

    def bury(self) -> int:
        """Count those that outlive the hoarder, and end them."""
        deadline = time.monotonic() + _LATE
        survivors = 0
        for descriptor in self._watched:
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                survivors += 1
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            os.close(descriptor)
        self._watched.clear()
        return survivors
