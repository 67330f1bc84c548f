"""What a supervisor's channel has still to send: frames that its socket has no room for, or that the kernel refuses.

The kernel counts the descriptors that all processes of a user have sent each other and nobody has received, and passes
on no more than the sender may have open (ETOOMANYREFS, unix(7)). Whoever uses it up need not be the other end, nor a
task of ours; and it passes. So such a frame waits, like one that finds no memory, and is given up in the end only if
somebody else can be told.
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import logging
import os
import resource
from typing import TYPE_CHECKING, ClassVar, Final

from scaleout_mp.ipc.channel import NOT_NOW, TRY_EVERY, TRY_FOR, close_all, refusal, send_now

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)

#: Seconds in which one warning is enough, of all channels.
_SAY_EVERY: Final = 60.0


@dataclasses.dataclass(kw_only=True, slots=True, eq=False)
class _Waiting:
    view: memoryview
    #: Duplicates of the sender's.
    descriptors: list[int]
    #: On the loop's clock.
    since: float
    name: str
    #: None as well once a part of it is under way: the rest has to follow.
    on_refused: Callable[[str], None] | None


class Outgoing:
    """Frames in their order. While there are any, it waits for room in the socket, or for the kernel, on a timer."""

    _said: ClassVar[float | None] = None

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop, on_sent: Callable[[], None]) -> None:
        """Send to a non-blocking `sock`; `on_sent` is called whenever something went."""
        self._sock = sock
        self._loop = loop
        self._on_sent = on_sent
        self._queue: collections.deque[_Waiting] = collections.deque()
        #: Why the kernel refuses the first frame, and since when; None: it does not.
        self._refusal: OSError | None = None
        self._refused_since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def send(
        self, frame: bytes, descriptors: Sequence[int], *, name: str = "", on_refused: Callable[[str], None] | None
    ) -> None:
        """Send a frame, or queue it with duplicates of its descriptors. Raises OSError when there can be none.

        `on_refused` is called with the reason when the kernel has refused it for `TRY_FOR` seconds, or when it is
        withdrawn by its `name`; it is not sent then. Without it, it is tried for ever.
        """
        view = memoryview(frame)
        if not self._queue:
            sent = self._try(view, descriptors)
            if sent is None or sent == len(view):
                return
            if sent:
                view, descriptors, on_refused = view[sent:], (), None
        waiting = _Waiting(
            view=view, descriptors=_duplicates(descriptors), since=self._loop.time(), name=name, on_refused=on_refused
        )
        self._queue.append(waiting)
        if len(self._queue) == 1:
            self._wait()

    def _try(self, view: memoryview, descriptors: Sequence[int]) -> int | None:
        """Return how many bytes went; None: the other end is gone, which reading reports after what it still sent."""
        try:
            sent = self._send(view, descriptors)
        except BlockingIOError:
            self._refusal = None
            return 0
        except OSError as error:
            if error.errno not in NOT_NOW:
                return None
            self._note(error)
            return 0
        self._refusal = None
        self._on_sent()
        return sent

    def _send(self, view: memoryview, descriptors: Sequence[int]) -> int:
        try:
            return send_now(self._sock, view, descriptors)
        except OSError as error:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            if error.errno != errno.ETOOMANYREFS or soft == hard:
                raise
            refused = error
        # Tasks cannot have as many open files as this process could: what they use up is not all of it. For a moment
        # only: programs use select(2), and what they start inherits the limit.
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            raise refused from None
        try:
            return send_now(self._sock, view, descriptors)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def _note(self, error: OSError) -> None:
        now = self._loop.time()
        if self._refusal is None:
            self._refused_since = now
        self._refusal = error
        if Outgoing._said is None or not 0 <= now - Outgoing._said < _SAY_EVERY:
            Outgoing._said = now
            text = "what a task needs cannot be handed over now: %s; it is tried again for %g s"
            logger.warning(text, refusal(error), TRY_FOR, extra={"action": "frame_refused"})

    def _wait(self) -> None:
        if self._refusal is None:
            self._loop.add_writer(self._sock.fileno(), self._flush)
            return
        # The socket has room: waiting for that would be a busy loop.
        self._loop.remove_writer(self._sock.fileno())
        if self._timer is None:
            self._timer = self._loop.call_later(TRY_EVERY, self._try_again)

    def _flush(self) -> None:
        while self._queue:
            first = self._queue[0]
            sent = self._try(first.view, first.descriptors)
            if sent is not None and sent < len(first.view):
                if sent:
                    close_all(first.descriptors)
                    first.view, first.descriptors, first.on_refused = first.view[sent:], [], None
                self._wait()
                return
            close_all(first.descriptors)
            self._queue.popleft()
        self._loop.remove_writer(self._sock.fileno())

    def _try_again(self) -> None:
        self._timer = None
        if self._refusal is not None:
            latest = self._loop.time() - TRY_FOR
            if self._refused_since <= latest:
                self._give_up(lambda waiting: waiting.since <= latest)
        if self._queue:
            self._flush()

    def withdraw(self, name: str) -> bool:
        """Give up a frame that the kernel refuses, or one behind it; return whether there was one of that name."""
        return self._refusal is not None and self._give_up(lambda waiting: waiting.name == name)

    def _give_up(self, which: Callable[[_Waiting], bool]) -> bool:
        assert self._refusal is not None
        problem = refusal(self._refusal)
        given_up = [waiting for waiting in self._queue if waiting.on_refused is not None and which(waiting)]
        for waiting in given_up:
            self._queue.remove(waiting)
            close_all(waiting.descriptors)
        for waiting in given_up:
            if waiting.on_refused is not None:
                # It may close the channel.
                waiting.on_refused(problem)
        return bool(given_up)

    def close(self) -> None:
        """Forget all of it. Call it before the socket is closed."""
        self._loop.remove_writer(self._sock.fileno())
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for waiting in self._queue:
            close_all(waiting.descriptors)
        self._queue.clear()


def _duplicates(descriptors: Sequence[int]) -> list[int]:
    duplicates: list[int] = []
    try:
        duplicates.extend(os.dup(descriptor) for descriptor in descriptors)
    except OSError:
        close_all(duplicates)
        raise
    return duplicates
