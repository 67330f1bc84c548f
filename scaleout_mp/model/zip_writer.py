"""Writing ZIP archives into memory in one pass, with large entries aligned for use in place."""

from __future__ import annotations

import dataclasses
import io
import struct
import zlib
from typing import TYPE_CHECKING, Any, Final, Protocol

from scaleout_mp.model import zip_reader as zf
from scaleout_mp.model.checksums import crc32, crc32_combine
from scaleout_mp.model.memfd import Bytes, MemoryFile
from scaleout_mp.model.zip_reader import ZipEntry

if TYPE_CHECKING:
    from collections.abc import Callable

#: Cache lines and the widest vector loads: arrays at such offsets of a page-aligned map are used in place.
ALIGNMENT: Final = 64

#: From this size on, combining two CRCs is cheaper than computing one over the data again.
COMBINE_FROM: Final = 1 << 20

# Extra field of Android's zipalign: the alignment as 16 bits, then zeros. Readers skip it.
_ALIGN_EXTRA: Final = 0xD935
_DATE_1980: Final = 0x21  # the earliest date of the format: equal input gives equal bytes
_VERSION_PLAIN: Final = 20
_VERSION_ZIP64: Final = 45
_MADE_BY_UNIX: Final = 3 << 8
_MODE_FILE: Final = 0o100644 << 16
_ZIP64_LOCAL_EXTRA: Final = 20


class Sink(Protocol):
    """Where an archive goes: appended to, never sought."""

    @property
    def size(self) -> int:
        """Bytes written so far."""
        ...

    def write(self, *parts: Bytes) -> int:
        """Append all parts."""
        ...


class ZipWriter:
    """Writes entries one after the other and the directory at the end.

    An alignment counts from the sink's first byte.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._start = sink.size
        self._entries: list[ZipEntry] = []

    def add(self, name: str, *parts: Bytes, crc: int | None = None, align: bool = False) -> None:
        """Store an entry whose bytes are all at hand. `crc`: their CRC-32 when it is known already."""
        size = sum(memoryview(part).nbytes for part in parts)
        if crc is None:
            crc = 0
            for part in parts:
                crc = crc32(part, crc)
        entry = self._plan(name, zf.STORED, align=align, wide=size >= zf.MAX_32)
        entry = dataclasses.replace(entry, crc=crc, size=size, compressed_size=size)
        header = self._header(entry, wide=size >= zf.MAX_32)
        if isinstance(self._sink, EntrySink) and size >= COMBINE_FROM:
            self._sink.write(header)
            self._sink.write_known(crc, *parts)
        else:
            self._sink.write(header, *parts)
        self._entries.append(entry)

    def add_raw(self, source: memoryview, entry: ZipEntry) -> None:
        """Take over an entry of another archive as it is: nothing is inflated or compressed again."""
        wide = max(entry.size, entry.compressed_size) >= zf.MAX_32
        plan = self._plan(entry.name, entry.method, align=entry.method == zf.STORED, wide=wide)
        plan = dataclasses.replace(plan, crc=entry.crc, size=entry.size, compressed_size=entry.compressed_size)
        self._sink.write(self._header(plan, wide=wide), source[entry.data_offset : entry.data_end])
        self._entries.append(plan)

    def stream(self, name: str, *, deflate_level: int | None = None) -> EntrySink:
        """Begin an entry whose bytes come later; close the sink that this returns before the next entry.

        `deflate_level`: None stores, 1 to 9 deflates. Only into memory: the header is completed afterwards.
        """
        sink = self._sink
        if not isinstance(sink, MemoryFile):
            raise TypeError("only an archive in memory takes streamed entries")
        method = zf.STORED if deflate_level is None else zf.DEFLATED
        entry = self._plan(name, method, align=True, wide=True)
        sink.write(self._header(entry, wide=True))

        def finish(crc: int, size: int, compressed_size: int) -> None:
            done = dataclasses.replace(entry, crc=crc, size=size, compressed_size=compressed_size)
            sink.patch(self._start + entry.header_offset, self._header(done, wide=True))
            self._entries.append(done)

        return EntrySink(sink, finish, deflate_level=deflate_level)

    def finish(self) -> None:
        """Write the directory."""
        offset = self._sink.size - self._start
        records = b"".join(_central_record(entry) for entry in self._entries)
        count, size = len(self._entries), len(records)
        end = b""
        if count >= zf.MAX_16 or offset + size >= zf.MAX_32:
            end = zf.END64.pack(
                zf.END64_MAGIC,
                zf.END64.size - 12,
                _VERSION_ZIP64,
                _VERSION_ZIP64,
                0,
                0,
                count,
                count,
                size,
                offset,
            ) + zf.LOCATOR64.pack(zf.LOCATOR64_MAGIC, 0, offset + size, 1)
        end += zf.END.pack(
            zf.END_MAGIC,
            0,
            0,
            min(count, zf.MAX_16),
            min(count, zf.MAX_16),
            min(size, zf.MAX_32),
            min(offset, zf.MAX_32),
            0,
        )
        self._sink.write(records, end)

    def _plan(self, name: str, method: int, *, align: bool, wide: bool) -> ZipEntry:
        """Decide where an entry and its data go; the sizes come later."""
        offset = self._sink.size - self._start
        data = offset + zf.LOCAL.size + len(name.encode()) + (_ZIP64_LOCAL_EXTRA if wide else 0)
        if align and data % ALIGNMENT:
            smallest = data + 6
            data = smallest + -smallest % ALIGNMENT
        return ZipEntry(
            name=name, method=method, crc=0, compressed_size=0, size=0, header_offset=offset, data_offset=data
        )

    @staticmethod
    def _header(entry: ZipEntry, *, wide: bool) -> bytes:
        """Return the local header, with padding up to where the data was planned."""
        name = entry.name.encode()
        extra = struct.pack("<2H2Q", zf.ZIP64_EXTRA, 16, entry.size, entry.compressed_size) if wide else b""
        padding = entry.data_offset - entry.header_offset - zf.LOCAL.size - len(name) - len(extra)
        if padding:
            extra += struct.pack("<3H", _ALIGN_EXTRA, padding - 4, ALIGNMENT) + bytes(padding - 6)
        header = zf.LOCAL.pack(
            zf.LOCAL_MAGIC,
            _VERSION_ZIP64 if wide else _VERSION_PLAIN,
            _name_flags(name),
            entry.method,
            0,
            _DATE_1980,
            entry.crc,
            zf.MAX_32 if wide else entry.compressed_size,
            zf.MAX_32 if wide else entry.size,
            len(name),
            len(extra),
        )
        return header + name + extra


def _name_flags(name: bytes) -> int:
    return 0 if name.isascii() else zf.FLAG_UTF8


def _central_record(entry: ZipEntry) -> bytes:
    name = entry.name.encode()
    values = (entry.size, entry.compressed_size, entry.header_offset)
    wide = [value for value in values if value >= zf.MAX_32]
    extra = struct.pack(f"<2H{len(wide)}Q", zf.ZIP64_EXTRA, 8 * len(wide), *wide) if wide else b""
    version = _VERSION_ZIP64 if wide else _VERSION_PLAIN
    size, compressed_size, offset = (min(value, zf.MAX_32) for value in values)
    fixed = zf.CENTRAL.pack(
        zf.CENTRAL_MAGIC,
        _MADE_BY_UNIX | version,
        version,
        _name_flags(name),
        entry.method,
        0,
        _DATE_1980,
        entry.crc,
        compressed_size,
        size,
        len(name),
        len(extra),
        0,
        0,
        0,
        _MODE_FILE,
        offset,
    )
    return fixed + name + extra


class EntrySink(io.RawIOBase):
    """The bytes of one entry as a file to write to. A helper's `save` gets one; it cannot seek."""

    def __init__(self, sink: Sink, finish: Callable[[int, int, int], None], *, deflate_level: int | None) -> None:
        super().__init__()
        self._sink = sink
        self._finish = finish
        self._deflater = None
        if deflate_level is not None:
            self._deflater = zlib.compressobj(deflate_level, zlib.DEFLATED, -zlib.MAX_WBITS)
        self._crc = 0
        self._size = 0
        self._compressed_size = 0

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

    def write(self, *parts: Any) -> int:
        """Append all parts; any contiguous buffers."""
        views = [memoryview(part).cast("B") for part in parts]
        for view in views:
            self._crc = crc32(view, self._crc)
        return self._append(views)

    def write_known(self, crc: int, *parts: Bytes) -> int:
        """Append parts whose common CRC-32 is known: they are not read for it again."""
        views = [memoryview(part).cast("B") for part in parts]
        length = sum(view.nbytes for view in views)
        self._crc = crc32_combine(self._crc, crc, length)
        return self._append(views)

    def abandon(self) -> None:
        """Close without finishing the entry; the archive is of no use then."""
        super().close()

    def close(self) -> None:
        """Finish the entry."""
        if self.closed:
            return
        if self._deflater is not None:
            self._compressed_size += self._sink.write(self._deflater.flush())
        self._finish(self._crc, self._size, self._compressed_size)
        super().close()

    def _append(self, views: list[memoryview]) -> int:
        if self.closed:
            raise ValueError("write to a finished entry")
        length = sum(view.nbytes for view in views)
        if self._deflater is None:
            self._compressed_size += self._sink.write(*views)
        else:
            for view in views:
                self._compressed_size += self._sink.write(self._deflater.compress(view))
        self._size += length
        return length
