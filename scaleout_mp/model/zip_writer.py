"""Writing ZIP archives in one pass, with large entries aligned for use in place."""

from __future__ import annotations

import dataclasses
import itertools
import struct
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

from scaleout_mp.model import zip_reader as zf
from scaleout_mp.model.checksums import crc32, crc32_combine
from scaleout_mp.model.memfd import Bytes, MemoryFile
from scaleout_mp.model.zip_reader import ZipEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from scaleout_mp.model.spliced import Backing

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


@runtime_checkable
class SummingSink(Sink, Protocol):
    """A sink that keeps the CRC-32 of all that goes into it."""

    def take(self, crc: int, size: int, blocks: Iterable[Bytes]) -> None:
        """Append blocks of `size` bytes whose common CRC-32 is known: they are not read for it again."""
        ...


class ScanSink:
    """Keeps size and CRC-32 of an archive and nothing else: what its header must say before it is written."""

    def __init__(self) -> None:
        self.size = 0
        self.crc = 0

    def write(self, *parts: Bytes) -> int:
        """Count and sum all parts."""
        written = 0
        for part in parts:
            self.crc = crc32(part, self.crc)
            written += len(part)
        self.size += written
        return written

    def take(self, crc: int, size: int, _blocks: Iterable[Bytes]) -> None:
        """Count and sum bytes without looking at them."""
        self.crc = crc32_combine(self.crc, crc, size)
        self.size += size


class ZipWriter:
    """Writes entries one after the other and the directory at the end.

    An alignment counts from the archive's first byte.
    """

    def __init__(self, sink: Sink, *, start: int | None = None, entries: Iterable[ZipEntry] = ()) -> None:
        """Begin an archive at the sink's end or, to go on with one, at `start`, with `entries` in place already."""
        self.entries = list(entries)
        self._sink = sink
        self._start = sink.size if start is None else start

    def add(self, name: str, *parts: Bytes, align: bool = False) -> int:
        """Store an entry whose bytes are all at hand; returns its CRC-32."""
        return self.add_blocks(name, lambda: parts, sum(len(part) for part in parts), align=align)

    def add_blocks(
        self,
        name: str,
        blocks: Callable[[], Iterable[Bytes]],
        size: int,
        *,
        crc: int | None = None,
        align: bool = False,
    ) -> int:
        """Store an entry of `size` bytes; returns its CRC-32.

        `blocks` gives its bytes, the same each time it is called: for the CRC-32, unless that is known, and to be
        written.
        """
        if crc is None:
            crc = 0
            for block in blocks():
                crc = crc32(block, crc)
        wide = size >= zf.MAX_32
        entry = self._plan(name, zf.STORED, align=align, wide=wide)
        entry = dataclasses.replace(entry, crc=crc, size=size, compressed_size=size)
        header = self._header(entry, wide=wide)
        if size < COMBINE_FROM:
            self._sink.write(header, *blocks())
        elif isinstance(self._sink, SummingSink):
            self._sink.write(header)
            self._sink.take(crc, size, blocks())
        else:
            for block in itertools.chain((header,), blocks()):
                self._sink.write(block)
        self.entries.append(entry)
        return crc

    def add_raw(self, source: Backing, entry: ZipEntry) -> None:
        """Take over an entry of another archive as it is: nothing is inflated or compressed again."""
        wide = max(entry.size, entry.compressed_size) >= zf.MAX_32
        plan = self._plan(entry.name, entry.method, align=entry.method == zf.STORED, wide=wide)
        plan = dataclasses.replace(plan, crc=entry.crc, size=entry.size, compressed_size=entry.compressed_size)
        self._sink.write(self._header(plan, wide=wide))
        source.copy_into(self._memory(), entry.data_offset, entry.data_end)
        self.entries.append(plan)

    def begin(self, name: str, method: int, *, crc: int = 0, size: int = 0) -> ZipEntry:
        """Write the header of an entry whose bytes come next. `end` must follow them."""
        self._memory()
        entry = self._plan(name, method, align=method == zf.STORED, wide=True)
        entry = dataclasses.replace(entry, crc=crc, size=size, compressed_size=size)
        self._sink.write(self._header(entry, wide=True))
        return entry

    def end(self, begun: ZipEntry, *, crc: int, size: int, compressed_size: int) -> None:
        """Finish an entry. When its header said something else, it is put right: only possible in memory."""
        entry = dataclasses.replace(begun, crc=crc, size=size, compressed_size=compressed_size)
        if entry != begun:
            self._memory().patch(self._start + entry.header_offset, self._header(entry, wide=True))
        self.entries.append(entry)

    def _memory(self) -> MemoryFile:
        if not isinstance(self._sink, MemoryFile):
            raise TypeError("only an archive in memory takes entries whose bytes are not at hand")
        return self._sink

    def finish(self) -> None:
        """Write the directory."""
        offset = self._sink.size - self._start
        records = b"".join(_central_record(entry) for entry in self.entries)
        count, size = len(self.entries), len(records)
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
