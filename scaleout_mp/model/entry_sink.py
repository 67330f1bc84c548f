"""The bytes of one entry as a file to write to: what a helper's `save` gets while a model is built."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Protocol

from scaleout_mp.model import zip_reader as zf
from scaleout_mp.model.checksums import crc32, crc32_combine
from scaleout_mp.model.deflate import AUTO_FROM, SAMPLE, BlockDeflater, Compression, saves

if TYPE_CHECKING:
    from collections.abc import Iterable

    from scaleout_mp.model.memfd import Bytes, MemoryFile
    from scaleout_mp.model.zip_reader import ZipEntry
    from scaleout_mp.model.zip_writer import ZipWriter


class _Body(Protocol):
    def write(self, *views: memoryview) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...


class EntrySink(io.RawIOBase):
    """A file that only takes bytes. Close it before the archive's next entry, or `abandon` it."""

    def __init__(self, writer: ZipWriter, file: MemoryFile, name: str, compression: Compression) -> None:
        """`file`: the memory that `writer` writes to."""
        super().__init__()
        self._writer = writer
        self._file = file
        self._name = name
        self._crc = 0
        self._size = 0
        #: Size and CRC-32 of the whole entry, when its writer knew them beforehand.
        self._announced: tuple[int, int] | None = None
        self._held = bytearray()
        self._body: _Body | None = None
        self._begun: ZipEntry | None = None
        self._data_start = 0
        self._stores: bool | None = None if compression == "auto" else compression == "stored"

    @property
    def size(self) -> int:
        """Bytes written so far, before compression."""
        return self._size

    def writable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the number of bytes written so far."""
        return self._size

    def decide(self, sample: Iterable[memoryview], size: int) -> bool:
        """Settle, before the first byte, whether the entry is stored, and say so.

        `sample`: pieces that stand for the `size` bytes to come; looked at where the choice is open.
        """
        if self._stores is None:
            self._stores = size < AUTO_FROM or not saves(sample)
        return self._stores

    def announce(self, *, size: int, crc: int) -> None:
        """Say, before the first byte, what all bytes of a stored entry will come to."""
        self._announced = (size, crc)

    def write(self, *parts: Any) -> int:
        """Append all parts; any contiguous buffers. They may be changed once this returns."""
        if self.closed:
            raise ValueError("write to a finished entry")
        views = [memoryview(part).cast("B") for part in parts if memoryview(part).nbytes]
        if self._announced is None:
            for view in views:
                self._crc = crc32(view, self._crc)
        length = sum(view.nbytes for view in views)
        self._size += length
        if self._stores is None:
            for view in views:
                self._held += view
            if len(self._held) >= SAMPLE:
                self._release_held()
        else:
            self._open_body().write(*views)
        return length

    def take(self, crc: int, size: int, blocks: Iterable[Bytes]) -> None:
        """Append blocks of `size` bytes whose common CRC-32 is known: they are not read for it again."""
        if self._stores is None:
            for block in blocks:
                self.write(block)
            return
        if self._announced is None:
            self._crc = crc32_combine(self._crc, crc, size)
        body = self._open_body()
        for block in blocks:
            body.write(memoryview(block))
        self._size += size

    def abandon(self) -> None:
        """Close without finishing the entry; the archive is of no use then."""
        if self._body is not None:
            self._body.close()
        super().close()

    def close(self) -> None:
        """Finish the entry."""
        if self.closed:
            return
        try:
            if self._stores is None:
                self._release_held()
            body = self._open_body()
            body.finish()
            assert self._begun is not None
            assert self._announced is None or self._announced[0] == self._size
            crc = self._crc if self._announced is None else self._announced[1]
            compressed_size = self._file.size - self._data_start
            self._writer.end(self._begun, crc=crc, size=self._size, compressed_size=compressed_size)
        finally:
            self.abandon()

    def _release_held(self) -> None:
        held, self._held = self._held, bytearray()
        self.decide((memoryview(held),), len(held))
        self._open_body().write(memoryview(held))

    def _open_body(self) -> _Body:
        if self._body is None:
            if self._announced is None:
                # The header will be put right afterwards, and a helper may use its buffers again.
                self._file.stop_hashing()
            size, crc = self._announced or (0, 0)
            method = zf.STORED if self._stores else zf.DEFLATED
            self._begun = self._writer.begin(self._name, method, size=size, crc=crc)
            self._data_start = self._file.size
            self._body = _StoredBody(self._file) if self._stores else _DeflatedBody(self._file)
        return self._body


class _StoredBody:
    def __init__(self, file: MemoryFile) -> None:
        self._file = file

    def write(self, *views: memoryview) -> None:
        self._file.write(*views)

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


class _DeflatedBody:
    def __init__(self, file: MemoryFile) -> None:
        self._deflater = BlockDeflater(file.write)

    def write(self, *views: memoryview) -> None:
        for view in views:
            self._deflater.write(view)

    def finish(self) -> None:
        self._deflater.finish()

    def close(self) -> None:
        self._deflater.close()
