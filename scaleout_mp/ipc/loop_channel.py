"""The supervisor's end of a control channel, on its event loop. Apart from the child's: that needs no asyncio."""

from __future__ import annotations

import array
import asyncio
import collections
import contextlib
import fcntl
import logging
import socket
import termios
from typing import TYPE_CHECKING

from scaleout_mp.errors import ProtocolViolation
from scaleout_mp.ipc.aside import close_aside
from scaleout_mp.ipc.channel import Kind, Receiver, close_all, readable
from scaleout_mp.ipc.outgoing import Outgoing
from scaleout_mp.ipc.ring_inbox import RingInbox

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scaleout_mp.ipc.frames import Frame

logger = logging.getLogger(__name__)


class SupervisorChannel:
    """The end on the supervisor's event loop. Never blocks; what the child sends is bounded and checked.

    `on_frame` is called for each frame and owns its descriptors; `on_closed` once, with the ProtocolViolation that
    ended the channel or None when the other end closed it. An exception of kind ProtocolViolation from `on_frame`
    ends the channel likewise.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        on_frame: Callable[[Frame], None],
        on_closed: Callable[[ProtocolViolation | None], None],
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._on_frame = on_frame
        self._on_closed = on_closed
        self._receiver = Receiver(sock, only_memory=True)
        self._loop = asyncio.get_running_loop()
        self._open = True
        self._inbox = RingInbox(self._loop, self._pass_on_records)
        self._outgoing = Outgoing(sock, self._loop, self._inbox.tell_of_mail)
        self._loop.add_reader(sock.fileno(), self._read)

    def serve(self, on_frame: Callable[[Frame], None], on_closed: Callable[[ProtocolViolation | None], None]) -> None:
        """Have other functions called from now on: the process serves another task."""
        self._on_frame = on_frame
        self._on_closed = on_closed

    @property
    def open(self) -> bool:
        """Whether frames can still arrive."""
        return self._open

    def send(
        self,
        frame: bytes,
        descriptors: Sequence[int] = (),
        *,
        name: str = "",
        on_refused: Callable[[str], None] | None = None,
    ) -> None:
        """Queue a frame. The descriptors are duplicated, so the caller may close its own at once.

        `name` and `on_refused` are those of `Outgoing.send`. Does nothing on a closed channel: its reader was told
        already.
        """
        if self._open:
            self._outgoing.send(frame, descriptors, name=name, on_refused=on_refused)

    def withdraw(self, name: str) -> bool:
        """Take back a frame that waits because the kernel refuses it; return whether there was one."""
        return self._outgoing.withdraw(name)

    def _read(self) -> None:
        try:
            frames = self._receiver.read()
        except BlockingIOError:
            return
        except ProtocolViolation as violation:
            self.close(violation)
            return
        except OSError:
            frames = None
        if frames is None:
            self.close(None)
            return
        self._pass_on_read(collections.deque(frames))

    def _pass_on_read(self, frames: collections.deque[Frame]) -> None:
        # Whatever was in the ring before any of them was sent is there by now: one look is enough, and that only before
        # what ends the task, so that a flood of frames does not become one of looks.
        emptied = False
        try:
            while frames:
                frame = frames.popleft()
                if self._inbox.takes(frame):
                    continue
                if not emptied and frame.kind is not Kind.PROGRESS and self._inbox.opened:
                    emptied = True
                    self._pass_on(self._inbox.read_all())
                self._on_frame(frame)
        except ProtocolViolation as violation:
            self.close(violation)
        except Exception as bug:
            # Of ours, which a task has found: it must not cost more than that task.
            logger.exception("a frame of a task could not be handled", extra={"action": "frame_bug"})
            self.close(ProtocolViolation(f"a frame could not be handled: {type(bug).__name__}"))
        else:
            if self._receiver.violation is not None:
                self.close(self._receiver.violation)
        finally:
            for unread in frames:
                close_all(unread.descriptors)

    def _pass_on(self, frames: list[Frame]) -> None:
        for frame in frames:
            self._on_frame(frame)

    def _pass_on_records(self) -> None:
        try:
            self._pass_on(self._inbox.read())
        except ProtocolViolation as violation:
            self.close(violation)

    def drain(self) -> None:
        """Read what is in the socket now; called once the child is dead. What others send meanwhile is not read."""
        if not self._open:
            return
        end = self._receiver.received + _unread(self._sock)
        while self._receiver.received < end and readable(self._sock, 0):
            self._read()
            if not self.open:
                return

    def close(self, violation: ProtocolViolation | None = None) -> None:
        """Close the channel; `on_closed` is called unless it was closed before."""
        if not self._open:
            return
        self._open = False
        if violation is None:
            # Its other end is closed, by its death as a rule: what it has logged counts.
            try:
                self._pass_on(self._inbox.read_all())
            except ProtocolViolation as last:
                violation = last
        self._inbox.close()
        self._loop.remove_reader(self._sock.fileno())
        self._outgoing.close()
        self._receiver.close()
        # A fork of this process may hold a copy: closing ours alone would tell the other end nothing.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if _unread(self._sock):
            # Descriptors may be among it, which are closed with the socket.
            close_aside([self._sock.detach()])
        else:
            self._sock.close()
        self._on_closed(violation)


def _unread(sock: socket.socket) -> int:
    """Return the bytes that wait in a socket."""
    count = array.array("i", [0])
    fcntl.ioctl(sock, termios.FIONREAD, count)
    return count[0]
