"""A container that shares another one's weights and has an end of its own.

In a container the metadata stand last. One with another id or other metadata therefore has the same bytes up to
there, and they need not exist twice.
"""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING

from scaleout_mp.model.memfd import Bytes, MappedBytes, MemoryFile, SealedMemory

if TYPE_CHECKING:
    from collections.abc import Iterator


class SplicedBytes:
    """The beginning of sealed memory, followed by a few bytes of its own; otherwise like `MappedBytes`.

    Read in pieces, or in spans that do not cross the seam, it costs no memory. Whoever asks for a descriptor or
    for one view of all gets a copy, made once and inside the kernel; the shared memory is let go then.
    """

    def __init__(self, head: SealedMemory, head_size: int, tail: bytes) -> None:
        """Take ownership of `head`, of which the first `head_size` bytes count."""
        self._head = head
        self._head_size = head_size
        self._tail = tail
        self._whole: SealedMemory | None = None
        self._sha256: str | None = None
        self._lock = threading.RLock()

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self._head_size + len(self._tail)

    @property
    def closed(self) -> bool:
        """Whether the memory was given back."""
        return (self._whole or self._head).closed

    @property
    def head(self) -> SealedMemory:
        """The memory that holds at least all bytes before the tail; it stays ours."""
        return self._whole or self._head

    def fileno(self) -> int:
        """Return a descriptor of all bytes; it stays ours."""
        return self._joined().fileno()

    def view(self) -> memoryview:
        """Return all bytes as one read-only view."""
        return self._joined().view()

    def span(self, start: int, end: int) -> memoryview:
        """Return the bytes from `start` up to `end` as a read-only view."""
        if end <= self._head_size:
            return self.head.span(start, end)
        if start >= self._head_size and not self.closed:
            return memoryview(self._tail)[start - self._head_size : end - self._head_size]
        return self._joined().span(start, end)

    def will_read(self, start: int, end: int) -> None:
        """Map the pages from `start` up to `end` at once."""
        self.head.will_read(start, min(end, self._head_size))

    def pieces(self) -> Iterator[memoryview]:
        """Yield all bytes in order, in as few views as they lie in."""
        yield self.span(0, self._head_size)
        yield self.span(self._head_size, self.size)

    def copy_into(self, file: MemoryFile, start: int, end: int) -> None:
        """Append the bytes from `start` up to `end` to `file`, those that are shared inside the kernel."""
        seam = self._head_size
        if start < seam:
            file.copy(self.head, start, min(end, seam))
        if end > seam:
            file.write(self.span(max(start, seam), end))

    def sha256(self) -> str:
        """Return the SHA-256 of the bytes in hex; computed once."""
        if self._sha256 is None:
            digest = hashlib.sha256()
            self.will_read(0, self._head_size)
            for piece in self.pieces():
                digest.update(piece)
            self._sha256 = digest.hexdigest()
        return self._sha256

    def dup(self) -> SplicedBytes:
        """Return a second owner of the same bytes."""
        with self._lock:
            twin = SplicedBytes(
                self._head.dup() if self._whole is None else self._whole.dup(), self._head_size, self._tail
            )
        twin._sha256 = self._sha256
        return twin

    def moved_to(self, fd: int) -> MappedBytes:
        """Return the owner of `fd`, a file that now holds the same bytes."""
        return MappedBytes(fd, self.size, sha256=self._sha256)

    def close(self) -> None:
        """Give the memory back as soon as no view of it is left. Safe to call again."""
        with self._lock:
            self._head.close()
            if self._whole is not None:
                self._whole.close()

    def _joined(self) -> SealedMemory:
        with self._lock:
            if self._whole is None:
                with MemoryFile() as file:
                    file.copy(self._head, 0, self._head_size)
                    file.write(self._tail)
                    self._whole = file.seal()
                self._head.close()
            return self._whole


#: What a container lies in.
Backing = MappedBytes | SplicedBytes


def splice(source: Backing, head_size: int, tail: Bytes) -> SplicedBytes | None:
    """Return the first bytes of `source` with another end; None where they could change, as in a file."""
    if isinstance(source, SplicedBytes):
        source = source.head
    if not isinstance(source, SealedMemory):
        return None
    return SplicedBytes(source.dup(), head_size, bytes(tail))
