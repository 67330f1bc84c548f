"""What Ctrl-C and SIGTERM mean, and how they reach the loop."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import signal
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

#: Seconds within which a second Ctrl-C ends the client.
SECOND_CTRL_C: Final = 5.0


class StopAction(enum.Enum):
    """What a signal asks for."""

    #: Abort the running tasks and stay.
    ABORT_TASKS = "abort_tasks"
    #: Abort the running tasks, report them, and leave.
    END = "end"
    #: Leave without waiting for anybody.
    END_NOW = "end_now"


class SignalReader:
    """Reads signals in their order. Pure: the time is given."""

    def __init__(self) -> None:
        self._ending = False
        self._interrupted_at: float | None = None

    @property
    def ending(self) -> bool:
        """Whether the client was told to end."""
        return self._ending

    def terminate(self) -> StopAction:
        """Read a SIGTERM, or a stop from the program."""
        if self._ending:
            return StopAction.END_NOW
        self._ending = True
        return StopAction.END

    def interrupt(self, now: float, *, tasks: int) -> StopAction:
        """Read a Ctrl-C at a moment when that many tasks run."""
        second = self._interrupted_at is not None and now - self._interrupted_at <= SECOND_CTRL_C
        if self._ending or second or not tasks:
            return self.terminate()
        self._interrupted_at = now
        return StopAction.ABORT_TASKS


@contextlib.contextmanager
def signals_to(on_signal: Callable[[int], None]) -> Iterator[None]:
    """Have SIGINT and SIGTERM call `on_signal` on the running loop; the old handlers return after the block.

    Does nothing outside the main thread, where Python takes no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            # None: a handler that was not set from Python, and cannot be set back from it.
            if handler is not None:
                signal.signal(number, handler)
