"""Byte strings that cross to another process beside a frame: short ones inline, long ones in one sealed memfd."""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.errors import ModelFormatError, ProtocolViolation
from scaleout_mp.model.memfd import MemoryFile, SealedMemory, verify_sealed

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Up to so many bytes in all, segments travel in the frame itself.
INLINE: Final = 1 << 15
#: Segments start at multiples of this, so that arrays over them are aligned for every vector unit.
ALIGNMENT: Final = 64
#: Segments beside one frame.
MAX_SEGMENTS: Final = 4096


def store(segments: Sequence[bytes | memoryview]) -> tuple[list[Any], SealedMemory | None]:
    """Return the table for the frame and, unless the table holds the bytes itself, the memory to send beside it."""
    sizes = [memoryview(segment).nbytes for segment in segments]
    if sum(sizes) <= INLINE:
        return [bytes(segment) for segment in segments], None
    with MemoryFile(name="scaleout-segments") as file:
        for segment, size in zip(segments, sizes, strict=True):
            file.write(segment, bytes(-size % ALIGNMENT))
        return list(sizes), file.seal()


def load(table: Any, descriptor: int | None) -> list[memoryview]:
    """Return the segments of a table, as writable private views: what is written stays in this process.

    Takes over the descriptor. Raises ProtocolViolation when table and memory do not fit each other.
    """
    try:
        return _load(table, descriptor)
    except ModelFormatError as error:
        raise ProtocolViolation(f"segments came in memory that is not sealed: {error}") from error
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _load(table: Any, descriptor: int | None) -> list[memoryview]:
    if not isinstance(table, list) or len(table) > MAX_SEGMENTS:
        raise ProtocolViolation("a table of segments is none, or too long")
    if descriptor is None:
        if not all(type(segment) is bytes for segment in table):
            raise ProtocolViolation("an inline segment is not bytes")
        return [memoryview(bytearray(segment)) for segment in table]
    if not all(type(size) is int and size >= 0 for size in table):
        raise ProtocolViolation("a segment has a size that is none")
    verify_sealed(descriptor)
    total = os.fstat(descriptor).st_size
    memory = mmap.mmap(descriptor, total, access=mmap.ACCESS_COPY) if total else bytearray()
    return split(table, memoryview(memory))


def split(table: Sequence[int], view: memoryview) -> list[memoryview]:
    """Return the segments that lie in `view`, by a table of their sizes. Raises ProtocolViolation when they do not."""
    if sum(size + -size % ALIGNMENT for size in table) != view.nbytes:
        raise ProtocolViolation("segments do not fill the memory that came with them")
    segments = []
    start = 0
    for size in table:
        segments.append(view[start : start + size])
        start += size + -size % ALIGNMENT
    return segments
