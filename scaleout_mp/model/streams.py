"""A part of a model as a file to read from."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaleout_mp.model.zip_reader import ArchiveLimits


class ViewStream(io.RawIOBase):
    """A read-only, seekable file over a memoryview; `getbuffer` gives the bytes without a copy."""

    def __init__(self, view: memoryview, *, limits: ArchiveLimits | None = None) -> None:
        """`limits`: for the archive that the bytes may be."""
        super().__init__()
        self.limits = limits
        self._view = view
        self._position = 0

    def getbuffer(self) -> memoryview:
        """Return all bytes, whatever the position, as a read-only view."""
        self._require_open()
        return self._view

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        self._require_open()
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position; past the end is allowed and reads nothing."""
        self._require_open()
        bases = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._view)}
        if whence not in bases:
            raise ValueError(f"unsupported whence: {whence}")
        if bases[whence] + offset < 0:
            raise ValueError("the position would lie before the start")
        self._position = bases[whence] + offset
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        """Return up to `size` bytes, all that are left when it is negative or None."""
        return bytes(self._take(len(self._view) if size is None or size < 0 else size))

    def readall(self) -> bytes:
        """Return all bytes that are left."""
        return self.read()

    def readinto(self, buffer: Any, /) -> int:
        """Fill `buffer` as far as bytes are left; returns how many those were."""
        target = memoryview(buffer).cast("B")
        piece = self._take(len(target))
        target[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        """Let go of the bytes."""
        self._view = memoryview(b"")
        super().close()

    def _take(self, size: int) -> memoryview:
        self._require_open()
        piece = self._view[self._position : self._position + size]
        self._position += len(piece)
        return piece

    def _require_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")
