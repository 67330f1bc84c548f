"""Both ends of a control channel: a blocking one for the child, one on the event loop for the supervisor."""

from __future__ import annotations

import array
import asyncio
import collections
import contextlib
import os
import select
import socket
import threading
from typing import TYPE_CHECKING, Final

from scaleout_mp.errors import ChannelError, ProtocolViolation
from scaleout_mp.ipc.frames import MAX_DESCRIPTORS, Frame, FrameDecoder, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_READ: Final = 1 << 18
_ANCILLARY: Final = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)


def close_all(descriptors: Iterable[int]) -> None:
    """Close descriptors, whatever state they are in."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _send_now(sock: socket.socket, data: bytes | memoryview, descriptors: Sequence[int], flags: int = 0) -> int:
    """Send once and return how many bytes went; the descriptors go with the first byte."""
    if not descriptors:
        return sock.send(data, flags)
    rights = array.array("i", descriptors)
    return sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], flags)


def _readable(sock: socket.socket, seconds: float) -> bool:
    # poll, not select: a supervisor of many tasks has descriptors past FD_SETSIZE.
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


class _Receiver:
    """Reads bytes and descriptors off a socket and puts them together as frames."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._decoder = FrameDecoder()
        self._descriptors: collections.deque[int] = collections.deque()

    def read(self, flags: int = 0) -> list[Frame] | None:
        """Read once. None: the other end is closed. Raises BlockingIOError, OSError and ProtocolViolation."""
        data, ancillary, message_flags, _ = self._sock.recvmsg(_READ, _ANCILLARY, flags | socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                rights = array.array("i")
                rights.frombytes(content[: len(content) - len(content) % rights.itemsize])
                self._descriptors.extend(rights)
        if message_flags & socket.MSG_CTRUNC:
            raise ProtocolViolation(f"more than {MAX_DESCRIPTORS} descriptors came at once")
        if not data:
            return None
        frames = []
        for frame_kind, count, fields in self._decoder.feed(data):
            if count > len(self._descriptors):
                raise ProtocolViolation(f"a {frame_kind.name} frame announces descriptors that did not come")
            frames.append(Frame(frame_kind, fields, [self._descriptors.popleft() for _ in range(count)]))
        if len(self._descriptors) > MAX_DESCRIPTORS:
            raise ProtocolViolation("descriptors came that no frame announced")
        return frames

    def close(self) -> None:
        close_all(self._descriptors)
        self._descriptors.clear()


class ChildChannel:
    """The blocking end, in a task or in the template. Safe to send from several threads."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._receiver = _Receiver(sock)
        self._ready: collections.deque[Frame] = collections.deque()
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._sock.fileno()

    def send(self, frame: bytes, descriptors: Sequence[int] = ()) -> None:
        """Return once the whole frame is in the socket: it is delivered even if this process dies right after.

        Raises ChannelError when the supervisor is gone.
        """
        try:
            with self._lock:
                sent = _send_now(self._sock, frame, descriptors)
                if sent < len(frame):
                    self._sock.sendall(memoryview(frame)[sent:])
        except OSError as error:
            raise ChannelError(f"the supervisor is gone: {error}") from error

    def receive(self) -> Frame | None:
        """Wait for the next frame; None when the other end is closed."""
        while not self._ready:
            frames = self._receiver.read()
            if frames is None:
                return None
            self._ready.extend(frames)
        return self._ready.popleft()

    def receive_ready(self) -> Frame | None:
        """Return a frame that is here already, without waiting.

        Raises ChannelError when the other end is closed.
        """
        if not self._ready:
            try:
                frames = self._receiver.read(socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            if frames is None:
                raise ChannelError("the supervisor is gone")
            self._ready.extend(frames)
        return self._ready.popleft() if self._ready else None

    def wait_readable(self, seconds: float) -> bool:
        """Wait until something can be received, at most so long."""
        return bool(self._ready) or _readable(self._sock, seconds)

    def close(self) -> None:
        """Close the socket and every descriptor that nobody took."""
        self._receiver.close()
        self._sock.close()


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
        self._receiver = _Receiver(sock)
        self._loop = asyncio.get_running_loop()
        self._queue: collections.deque[tuple[memoryview, list[int]]] = collections.deque()
        self._open = True
        self._loop.add_reader(sock.fileno(), self._read)

    @property
    def open(self) -> bool:
        """Whether frames can still arrive."""
        return self._open

    def send(self, frame: bytes, descriptors: Sequence[int] = ()) -> None:
        """Queue a frame. The descriptors are duplicated, so the caller may close its own at once.

        Does nothing on a closed channel: its reader was told already.
        """
        if not self._open:
            return
        view = memoryview(frame)
        if not self._queue:
            sent = self._try_send(view, descriptors)
            if sent is None or sent == len(view):
                return
            view, descriptors = view[sent:], [] if sent else descriptors
            self._loop.add_writer(self._sock.fileno(), self._write)
        self._queue.append((view, [os.dup(descriptor) for descriptor in descriptors]))

    def _try_send(self, view: memoryview, descriptors: Sequence[int]) -> int | None:
        try:
            return _send_now(self._sock, view, descriptors)
        except BlockingIOError:
            return 0
        except OSError:
            # The peer is gone; reading reports it after what it still sent.
            return None

    def _write(self) -> None:
        while self._queue:
            view, descriptors = self._queue[0]
            sent = self._try_send(view, descriptors)
            if sent == 0:
                return
            if sent is not None and sent < len(view):
                close_all(descriptors)
                self._queue[0] = (view[sent:], [])
                return
            close_all(descriptors)
            self._queue.popleft()
        self._loop.remove_writer(self._sock.fileno())

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
        for position, frame in enumerate(frames):
            try:
                self._on_frame(frame)
            except ProtocolViolation as violation:
                for unread in frames[position + 1 :]:
                    close_all(unread.descriptors)
                self.close(violation)
                return

    def drain(self, most: int = 1 << 26) -> None:
        """Read what is in the socket now, up to `most` bytes' worth of reads; called once the child is dead."""
        for _ in range(most // _READ):
            if not self._open or not _readable(self._sock, 0):
                return
            self._read()

    def close(self, violation: ProtocolViolation | None = None) -> None:
        """Close the channel; `on_closed` is called unless it was closed before."""
        if not self._open:
            return
        self._open = False
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        for _, descriptors in self._queue:
            close_all(descriptors)
        self._queue.clear()
        self._receiver.close()
        self._sock.close()
        self._on_closed(violation)


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a new channel, both close-on-exec."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


__all__ = ["ChildChannel", "Frame", "Kind", "SupervisorChannel", "channel_pair", "close_all"]
