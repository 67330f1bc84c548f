"""Ctrl-C and SIGTERM: the handler only counts, the demo looks where it can stop."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Ctrl-C, kill, and a terminal that was closed.
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class DemoStopped(Exception):  # noqa: N818 - no error: the user wants it
    """The user ended the demo."""


class StopRequest:
    """How often the user asked for the end."""

    def __init__(self) -> None:
        self.count = 0

    def check(self) -> None:
        """Raise DemoStopped once the user has asked."""
        if self.count:
            raise DemoStopped

    @property
    def impatient(self) -> bool:
        """Whether the user asked more than once."""
        return self.count > 1


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Count signals during the block; the old handlers return after it. For the main thread."""
    request = StopRequest()

    def count(_number: int, _frame: Any) -> None:
        request.count += 1

    before = {number: signal.signal(number, count) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            # None: it was not set from Python, and cannot be set back from it.
            if handler is not None:
                signal.signal(number, handler)
