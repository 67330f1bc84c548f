"""The child's end of a control channel, which blocks, and what both ends share."""

from __future__ import annotations

import array
import collections
import contextlib
import errno
import os
import select
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import msgpack

from scaleout_mp.errors import ChannelError, ProtocolViolation
from scaleout_mp.ipc.aside import close_aside, is_memory
from scaleout_mp.ipc.frames import LENGTH, MAX_DESCRIPTORS, MAX_FRAME, Frame, FrameDecoder, Kind, encode, too_long
from scaleout_mp.ipc.ring import RingWriter

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

READ_SIZE: Final = 1 << 16
#: Records of a task that go through the socket before there is a ring: most tasks log little.
_RECORDS_BEFORE_RING: Final = 4
_RECORDS_BEFORE_NEXT_TRY: Final = 1000
#: Seconds between two looks whether a full ring has room.
_FULL: Final = 0.0005
#: What the kernel says of a frame while it is short of memory, or while this user has as many descriptors in flight as
#: the sender may have open (unix(7)): the same frame may pass later. The other end is as well as before.
NOT_NOW: Final = frozenset({errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM})
#: Seconds between two tries, and for which a frame is tried at most.
TRY_EVERY: Final = 0.05
TRY_FOR: Final = 10.0
_BELL: Final = encode(Kind.BELL)
_ANCILLARY: Final = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)


def close_all(descriptors: Iterable[int]) -> None:
    """Close descriptors, whatever state they are in."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def send_now(sock: socket.socket, data: bytes | memoryview, descriptors: Sequence[int], flags: int = 0) -> int:
    """Send once and return how many bytes went; the descriptors go with the first byte."""
    if not descriptors:
        return sock.send(data, flags)
    rights = array.array("i", descriptors)
    return sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], flags)


def readable(sock: socket.socket, seconds: float) -> bool:
    # poll, not select: a supervisor of many tasks has descriptors past FD_SETSIZE.
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


class Receiver:
    """Reads bytes and descriptors off a socket and puts them together as frames."""

    def __init__(self, sock: socket.socket, *, only_memory: bool = False) -> None:
        """With `only_memory`, a descriptor of anything else is a violation."""
        self._sock = sock
        self._only_memory = only_memory
        #: Bytes that were read.
        self.received = 0
        self._decoder = FrameDecoder()
        self._descriptors: collections.deque[int] = collections.deque()

    @property
    def violation(self) -> ProtocolViolation | None:
        """What came after the frames that were read, when it is no frame."""
        return self._decoder.violation

    def read(self, flags: int = 0) -> list[Frame] | None:
        """Read once. None: the other end is closed. Raises BlockingIOError, OSError and ProtocolViolation."""
        data, ancillary, message_flags, _ = self._sock.recvmsg(READ_SIZE, _ANCILLARY, flags | socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                rights = array.array("i")
                rights.frombytes(content[: len(content) - len(content) % rights.itemsize])
                self._take(rights)
        self.received += len(data)
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

    def _take(self, descriptors: Iterable[int]) -> None:
        foreign = []
        for descriptor in descriptors:
            if self._only_memory and not is_memory(descriptor):
                foreign.append(descriptor)
            else:
                self._descriptors.append(descriptor)
        if foreign:
            close_aside(foreign)
            raise ProtocolViolation("a descriptor came that is no memory")

    def close(self) -> None:
        close_all(self._descriptors)
        self._descriptors.clear()


class ChildChannel:
    """The blocking end, in a task or in the template. Safe to send from several threads."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._receiver = Receiver(sock)
        self._ready: collections.deque[Frame] = collections.deque()
        self._lock = threading.Lock()
        self._ring: RingWriter | None = None
        self._pack = msgpack.Packer().pack
        self._before_ring = _RECORDS_BEFORE_RING

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._sock.fileno()

    def send(self, frame: bytes, descriptors: Sequence[int] = (), *, try_for: float = TRY_FOR) -> None:
        """Return once the whole frame is in the socket: it is delivered even if this process dies right after.

        Tries for `try_for` seconds where the kernel refuses it for now. Raises
        ChannelError when that lasts, and when the supervisor is gone.
        """
        try:
            with self._lock:
                sent = self._begin(frame, descriptors, try_for)
                if sent < len(frame):
                    self._sock.sendall(memoryview(frame)[sent:])
        except OSError as error:
            raise _failed(error) from error

    def _begin(self, frame: bytes, descriptors: Sequence[int], try_for: float) -> int:
        deadline = 0.0
        while True:
            try:
                return send_now(self._sock, frame, descriptors)
            except OSError as error:
                deadline = deadline or time.monotonic() + try_for
                if error.errno not in NOT_NOW or time.monotonic() >= deadline:
                    raise
            # It has no event to wait for: some other process has to receive.
            time.sleep(TRY_EVERY)

    def record(self, kind: Kind, *fields: Any) -> bool:
        """Send a record: what `send` promises of a frame, at a fraction of its cost once a task logs a lot.

        Records arrive in order, and before every other frame that is sent after them. Waits while the supervisor
        does not keep up. Returns whether there may be something to receive. Raises ChannelError when the supervisor
        is gone.
        """
        if self._ring is None and not self._open_ring():
            self.send(encode(kind, *fields))
            return True
        with self._lock:
            ring = self._ring
            if ring is None:
                raise ChannelError("the channel is closed")
            # What `encode` does, with a packer that is kept.
            body = self._pack((kind, 0, *fields))
            if len(body) > MAX_FRAME:
                raise too_long(kind, len(body))
            frame = LENGTH.pack(len(body)) + body
            written = ring.write(frame)
            if written == len(frame) and ring.awake:
                return ring.mail
            if ring.needs_bell() or written < len(frame):
                self._ring_bell()
            self._write_rest(ring, frame[written:])
            return True

    def _write_rest(self, ring: RingWriter, rest: bytes) -> None:
        while rest:
            time.sleep(_FULL)
            rest = rest[ring.write(rest) :]
            if ring.needs_bell():
                self._ring_bell()

    def _ring_bell(self) -> None:
        try:
            self._sock.sendall(_BELL)
        except OSError as error:
            raise _failed(error) from error

    def _open_ring(self) -> bool:
        """Return whether there is a ring now."""
        with self._lock:
            if self._before_ring:
                self._before_ring -= 1
                return False
            if self._ring is not None:
                return True
            try:
                ring = RingWriter()
            except OSError:
                # Out of descriptors, or no file may be so large: the socket does it as well. Asked again later.
                self._before_ring = _RECORDS_BEFORE_NEXT_TRY
                return False
            try:
                send_now(self._sock, encode(Kind.RING, descriptors=1), [ring.descriptor])
            except OSError as error:
                ring.close()
                if error.errno not in NOT_NOW:
                    raise _failed(error) from error
                self._before_ring = _RECORDS_BEFORE_NEXT_TRY
                return False
            finally:
                ring.close_descriptor()
            self._ring = ring
            return True

    def receive(self) -> Frame | None:
        """Wait for the next frame; None when the other end is closed."""
        while not self._ready:
            try:
                frames = self._receiver.read()
            except OSError:
                # Reset: it died with something of ours unread.
                frames = None
            if frames is None:
                return None
            self._ready.extend(frames)
        return self._ready.popleft()

    def receive_ready(self) -> Frame | None:
        """Return a frame that is here already, without waiting.

        Raises ChannelError when the other end is closed.
        """
        if not self._ready:
            if self._ring is not None and not self._ring.has_mail():
                return None
            try:
                frames = self._receiver.read(socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            except OSError:
                # Reset: it died with something of ours unread.
                frames = None
            if frames is None:
                raise ChannelError("the supervisor is gone")
            self._ready.extend(frames)
        return self._ready.popleft() if self._ready else None

    def waitreadable(self, seconds: float) -> bool:
        """Wait until something can be received, at most so long."""
        return bool(self._ready) or readable(self._sock, seconds)

    def close(self) -> None:
        """Close the socket and every descriptor that nobody took."""
        self._receiver.close()
        self._sock.close()
        ring, self._ring = self._ring, None
        if ring is not None:
            ring.close()


def refusal(error: OSError) -> str:
    """Say why a frame could not be sent, of an error in `NOT_NOW`."""
    if error.errno == errno.ETOOMANYREFS:
        return f"processes of this user have too many descriptors under way to each other: {error}"
    return f"the kernel takes no more messages: {error}"


def _failed(error: OSError) -> ChannelError:
    return ChannelError(refusal(error) if error.errno in NOT_NOW else f"the supervisor is gone: {error}")


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a new channel, both close-on-exec."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


__all__ = ["ChildChannel", "Frame", "Kind", "channel_pair", "close_all"]
