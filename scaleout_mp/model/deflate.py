"""Deflating large data on several cores, and saying beforehand whether it is worth it.

Only compression uses `isal`. What comes from outside is inflated by zlib, which has met hostile bytes for decades.
"""

from __future__ import annotations

import collections
import os
import zlib
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from scaleout_mp.model.checksums import fast_zlib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from concurrent.futures import Future, ThreadPoolExecutor

#: How new contents are written: as they are, which lets weights be used in place; deflated; or whichever of the two a
#: sample speaks for.
Compression = Literal["auto", "stored", "deflate"]
COMPRESSIONS: Final[tuple[Compression, ...]] = ("auto", "stored", "deflate")

#: Below this many bytes "auto" stores: deflate could not save enough to matter.
AUTO_FROM: Final = 1 << 16
#: Bytes of the sample that "auto" judges by, and of each of the pieces that it is taken in.
SAMPLE: Final = 1 << 18
SAMPLE_PIECE: Final = 1 << 14
#: What deflate must leave at most of the sample for "auto" to choose it.
_WORTH: Final = 0.9

#: Small enough for output buffers that the allocator keeps, large enough to lose nothing at the seams.
_BLOCK: Final = 1 << 18
_MOST_THREADS: Final = 4
#: isal's first level compresses weights as well as zlib's sixth, twenty times as fast.
_FAST_LEVEL: Final = 1
_LEVEL: Final = 6
_MEMORY_LEVEL: Final = 9
#: A last block that holds nothing.
_END: Final = b"\x03\x00"

_Block = bytes | memoryview


def saves(pieces: Iterable[bytes | bytearray | memoryview]) -> bool:
    """Say whether deflate would make what these pieces stand for at least 10 % smaller."""
    sample = b"".join(pieces)
    return sum(map(len, _deflate(sample))) <= _WORTH * len(sample)


class Sampled(Protocol):
    """What a sample can be taken of: a flat memoryview, or what gives one for a slice of its bytes."""

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        ...

    def __getitem__(self, part: slice, /) -> memoryview:
        """Return the bytes of a slice with a start and a stop."""
        ...


def sample_of(buffers: Sequence[Sampled]) -> list[memoryview]:
    """Return pieces of buffers, spread evenly over all their bytes, `SAMPLE` bytes at most."""
    total = sum(buffer.nbytes for buffer in buffers)
    stride = max(SAMPLE_PIECE, -(-total // (SAMPLE // SAMPLE_PIECE)))
    pieces = []
    # Where the next piece begins, counted from the start of the buffer at hand.
    position = 0
    for buffer in buffers:
        while position < buffer.nbytes:
            pieces.append(buffer[position : position + SAMPLE_PIECE])
            position += stride
        position -= buffer.nbytes
    return pieces


def _deflate(block: _Block) -> tuple[bytes, bytes]:
    """Deflate a block, in two pieces. It ends at a whole byte and is not the last: the next can be laid behind it."""
    fast: Any = fast_zlib()
    library: Any = zlib if fast is None else fast
    level = _LEVEL if fast is None else _FAST_LEVEL
    deflater = library.compressobj(level, library.DEFLATED, -zlib.MAX_WBITS, _MEMORY_LEVEL)
    return deflater.compress(block), deflater.flush(library.Z_SYNC_FLUSH)


class BlockDeflater:
    """Deflates in blocks of 256 KiB, as many at once as there are cores (four at most), and gives them out in order."""

    def __init__(self, emit: Callable[..., object], *, threads: int | None = None) -> None:
        """`emit` gets the deflated bytes, in one piece or several, in the thread that writes."""
        self._emit = emit
        self._threads = threads or min(_MOST_THREADS, len(os.sched_getaffinity(0)))
        self._pool: ThreadPoolExecutor | None = None
        self._jobs: collections.deque[Future[tuple[bytes, bytes]]] = collections.deque()
        self._pending = bytearray()

    def write(self, view: memoryview) -> None:
        """Deflate all bytes of a flat view. They may be changed once this returns."""
        if self._pending:
            room = _BLOCK - len(self._pending)
            self._pending += view[:room]
            view = view[room:]
            if len(self._pending) == _BLOCK:
                self._submit_pending()
        borrowed = len(view) >= _BLOCK
        while len(view) >= _BLOCK:
            self._submit(view[:_BLOCK])
            view = view[_BLOCK:]
        self._pending += view
        if borrowed:
            self._emit_down_to(0)

    def finish(self) -> None:
        """Deflate what is left and end the stream."""
        if self._pending and not self._jobs:
            # The last of few: not worth a thread.
            self._emit(*_deflate(bytes(self._pending)))
        elif self._pending:
            self._submit_pending()
        self._emit_down_to(0)
        self._emit(_END)
        self.close()

    def close(self) -> None:
        """Give the threads back; what was not given out is dropped."""
        self._jobs.clear()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _submit_pending(self) -> None:
        self._submit(bytes(self._pending))
        self._pending.clear()

    def _submit(self, block: _Block) -> None:
        if self._threads > 1:
            self._emit_down_to(2 * self._threads - 1)
            if self._pool is None:
                # Tasks load this module, and few of them deflate.
                from concurrent.futures import ThreadPoolExecutor

                self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="deflate")
            try:
                self._jobs.append(self._pool.submit(_deflate, block))
                return
            except RuntimeError:
                # A task may not be allowed another thread.
                self._threads = 1
        self._emit_down_to(0)
        self._emit(*_deflate(block))

    def _emit_down_to(self, count: int) -> None:
        while len(self._jobs) > count:
            self._emit(*self._jobs.popleft().result())
