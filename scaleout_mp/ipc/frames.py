"""Frames of the control channel: a length, then a msgpack array.

`[kind, descriptors, field, ...]`, where `descriptors` is how many file descriptors travel beside the frame. The length
is four bytes, little-endian, and does not count itself.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from typing import Any, Final

import msgpack

from scaleout_mp.errors import ProtocolViolation

#: What stands before a frame.
LENGTH: Final = struct.Struct("<I")

#: No frame is longer, in bytes. Whatever may be larger travels in a memfd.
MAX_FRAME: Final = 1 << 20
#: Descriptors beside one frame; the kernel's own bound (SCM_MAX_FD) is 253.
MAX_DESCRIPTORS: Final = 64
#: Callables that a template keeps loaded; the one that came first goes first, on both sides.
MAX_LOADED: Final = 64


class Kind(enum.IntEnum):
    """What a frame says."""

    # Supervisor to task.
    TASK = 1
    ABORT = 2
    # Task to supervisor.
    METRIC = 16
    ATTRIBUTES = 17
    TELEMETRY = 18
    LOG = 19
    RESULT = 20
    FAILURE = 21
    PROGRESS = 22
    STATE = 23
    INFERENCE = 24
    #: The memory in which records come from now on; see ring.py.
    RING = 25
    #: There may be records in it.
    BELL = 26
    # Supervisor to template.
    SETUP = 32
    LOAD = 33
    START = 34
    #: A task is being killed.
    DOOM = 35
    # Template to supervisor.
    READY = 48
    LOADED = 49
    STARTED = 50
    NOT_STARTED = 51
    EXITED = 52
    #: Nobody is left of a task that had left somebody.
    CLEARED = 53
    # Supervisor to lookout.
    WATCH = 64
    FORGET = 65
    # Lookout to supervisor.
    USE = 80
    BREACH = 81


@dataclasses.dataclass(frozen=True, slots=True)
class Frame:
    """One frame, decoded but not yet checked against what its kind demands."""

    kind: Kind
    fields: list[Any]
    descriptors: list[int]


def encode(kind: Kind, *fields: Any, descriptors: int = 0) -> bytes:
    """Return the bytes of one frame. Raises ProtocolViolation when it would be longer than MAX_FRAME."""
    body: bytes = msgpack.packb([int(kind), descriptors, *fields])
    if len(body) > MAX_FRAME:
        raise too_long(kind, len(body))
    return LENGTH.pack(len(body)) + body


def too_long(kind: Kind, size: int) -> ProtocolViolation:
    """Return the error that says that a frame is longer than MAX_FRAME."""
    return ProtocolViolation(f"a {kind.name} frame of {size} bytes is over the bound of {MAX_FRAME}")


class FrameDecoder:
    """Cut a byte stream into frames; never holds more than one frame and one read of undecoded bytes."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        #: What is wrong with the bytes after the frames that were returned; nothing is decoded from there on.
        self.violation: ProtocolViolation | None = None

    def feed(self, data: bytes) -> list[tuple[Kind, int, list[Any]]]:
        """Return the frames that are whole now, as (kind, descriptors, fields).

        What follows them may be no frame: whether they come with it in one read is chance, so they count all the same.
        Raises ProtocolViolation on a length over MAX_FRAME and on what is not a frame, once none are left before it.
        """
        frames: list[tuple[Kind, int, list[Any]]] = []
        self._buffer += data
        if self.violation is None:
            try:
                self._cut(frames)
            except ProtocolViolation as violation:
                self.violation = violation
                self._buffer.clear()
        if self.violation is not None and not frames:
            raise self.violation
        return frames

    def _cut(self, frames: list[tuple[Kind, int, list[Any]]]) -> None:
        buffer = self._buffer
        start = 0
        while len(buffer) - start >= LENGTH.size:
            (length,) = LENGTH.unpack_from(buffer, start)
            if length > MAX_FRAME:
                raise ProtocolViolation(f"a frame announces {length} bytes, over the bound of {MAX_FRAME}")
            end = start + LENGTH.size + length
            if len(buffer) < end:
                break
            frames.append(_decode(bytes(buffer[start + LENGTH.size : end])))
            start = end
        del buffer[:start]

    @property
    def pending(self) -> int:
        """Bytes of a frame that has not arrived whole."""
        return len(self._buffer)


def _decode(body: bytes) -> tuple[Kind, int, list[Any]]:
    try:
        parts = msgpack.unpackb(body, strict_map_key=False)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        # ValueError covers bad UTF-8, absurd nesting and trailing bytes; TypeError an unhashable map key.
        raise ProtocolViolation(f"a frame of {len(body)} bytes is not msgpack: {type(error).__name__}") from error
    if not isinstance(parts, list) or len(parts) < 2:
        raise ProtocolViolation("a frame is not an array that starts with kind and descriptor count")
    kind, descriptors, *fields = parts
    if type(kind) is not int or type(descriptors) is not int or not 0 <= descriptors <= MAX_DESCRIPTORS:
        raise ProtocolViolation("a frame has a kind or descriptor count that is none")
    try:
        return Kind(kind), descriptors, fields
    except ValueError:
        raise ProtocolViolation(f"a frame is of unknown kind {kind}") from None
