"""A strict reader of ZIP archives that lie in memory.

Stored entries are views of the archive, not copies. Everything that an archive from outside says about
itself is checked against its bytes and against limits before anything is inflated. Offsets and fields:
PKWARE APPNOTE 6.3.10, sections 4.3 and 4.5.3.
"""

from __future__ import annotations

import dataclasses
import stat
import struct
import zlib
from typing import TYPE_CHECKING, Final

from scaleout_mp.errors import ModelFormatError
from scaleout_mp.model.checksums import crc32
from scaleout_mp.model.numpy_used import np

if TYPE_CHECKING:
    from collections.abc import Iterator

STORED: Final = 0
DEFLATED: Final = 8

LOCAL_MAGIC: Final = b"PK\x03\x04"
CENTRAL_MAGIC: Final = b"PK\x01\x02"
END_MAGIC: Final = b"PK\x05\x06"
END64_MAGIC: Final = b"PK\x06\x06"
LOCATOR64_MAGIC: Final = b"PK\x06\x07"

#: magic, version needed, flags, method, time, date, crc, compressed size, size, name length, extra length
LOCAL: Final = struct.Struct("<4s5H3L2H")
#: magic, version made by, version needed, flags, method, time, date, crc, compressed size, size, name length,
#: extra length, comment length, disk, internal attributes, external attributes, header offset
CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
#: magic, disk, directory's disk, entries on this disk, entries, directory size and offset, comment length
END: Final = struct.Struct("<4s4H2LH")
#: magic, record size, version made by, version needed, disk, directory's disk, entries on this disk, entries,
#: directory size, directory offset
END64: Final = struct.Struct("<4sQ2H2L4Q")
#: magic, disk, offset of the END64 record, number of disks
LOCATOR64: Final = struct.Struct("<4sLQL")

FLAG_UTF8: Final = 0x800
_FLAGS_ENCRYPTED: Final = 0x1 | 0x40 | 0x2000
ZIP64_EXTRA: Final = 1
MAX_32: Final = 0xFFFFFFFF
MAX_16: Final = 0xFFFF

#: Deflate spends at least one bit on a match of 258 bytes; the rest is room for a short block.
_MAX_RATIO: Final = 1032
_STEP: Final = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArchiveLimits:
    """What an archive may claim."""

    #: Entries in the directory.
    max_entries: int = 4096
    #: Bytes that deflated entries may inflate to, all together. Stored ones are bounded by the archive itself.
    max_inflated: int = 16 << 30


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ZipEntry:
    """One entry of an archive; offsets count from the archive's first byte."""

    name: str
    method: int
    crc: int
    compressed_size: int
    size: int
    header_offset: int
    data_offset: int

    @property
    def data_end(self) -> int:
        """Offset just past the entry's data."""
        return self.data_offset + self.compressed_size

    def raw(self, archive: memoryview) -> memoryview:
        """Return the entry's bytes as they lie in the archive."""
        return archive[self.data_offset : self.data_end]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Directory:
    offset: int
    size: int
    entries: int


def looks_like_zip(view: memoryview) -> bool:
    """Say whether the bytes are, or once were, a ZIP archive: by their start or by their end."""
    start = bytes(view[:4])
    return LOCAL_MAGIC.startswith(start) or start == END_MAGIC or _find_end(view) is not None


def read_directory(view: memoryview, limits: ArchiveLimits) -> dict[str, ZipEntry]:
    """Return the entries by name, or raise ModelFormatError with the reason."""
    directory = _locate_directory(view)
    if directory.entries > limits.max_entries:
        raise ModelFormatError(f"the archive has {directory.entries} entries; {limits.max_entries} are allowed")
    entries: dict[str, ZipEntry] = {}
    inflated = 0
    for entry in _walk_directory(view, directory):
        if entry.name in entries:
            raise ModelFormatError(f"entry {entry.name!r} occurs twice")
        inflated += entry.size if entry.method == DEFLATED else 0
        if inflated > limits.max_inflated:
            raise ModelFormatError(
                f"the entries inflate to more than the {limits.max_inflated:,} bytes that are allowed"
            )
        entries[entry.name] = entry
    _refuse_overlap(entries, directory)
    return entries


def read_entry(raw: memoryview, entry: ZipEntry, *, verify: bool) -> memoryview:
    """Return an entry's bytes, read-only: `raw` itself when it is stored, else inflated.

    `raw`: its bytes in the archive. `verify`: compare a stored entry with its CRC-32. What is inflated is always
    compared.
    """
    if entry.method == STORED:
        if verify and crc32(raw) != entry.crc:
            raise _damaged(entry)
        return raw
    # Not zeroed: pages are taken only as far as data really comes out.
    target = np.empty(entry.size, dtype=np.uint8).data
    filled = 0
    for piece in iter_entry(raw, entry):
        target[filled : filled + len(piece)] = piece
        filled += len(piece)
    return target.toreadonly()


def iter_entry(raw: memoryview, entry: ZipEntry) -> Iterator[bytes | memoryview]:
    """Yield an entry's bytes in pieces, inflated as they are asked for, so that no entry fills the memory.

    `raw`: its bytes in the archive. ModelFormatError when they are not what the directory says; damage may show only
    after the last piece.
    """
    size = crc = 0
    for piece in _slices(raw) if entry.method == STORED else _inflate(raw, entry):
        size += len(piece)
        if size > entry.size:
            raise ModelFormatError(f"entry {entry.name!r} inflates to more than its declared size")
        crc = crc32(piece, crc)
        yield piece
    if size != entry.size:
        raise ModelFormatError(f"entry {entry.name!r} is cut off")
    if crc != entry.crc:
        raise _damaged(entry)


def _damaged(entry: ZipEntry) -> ModelFormatError:
    return ModelFormatError(f"entry {entry.name!r} is damaged: its CRC-32 differs")


def _slices(raw: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(raw), _STEP):
        yield raw[start : start + _STEP]


def _inflate(raw: memoryview, entry: ZipEntry) -> Iterator[bytes]:
    """Yield what deflated bytes hold, at most a step at a time, up to the end of the stream."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        for piece in _slices(raw):
            pending: bytes | memoryview = piece
            while pending and not inflater.eof:
                yield inflater.decompress(pending, _STEP)
                pending = inflater.unconsumed_tail
        # What a full output buffer kept back when the input was used up.
        while not inflater.eof and (rest := inflater.decompress(b"", _STEP)):
            yield rest
    except zlib.error as error:
        raise ModelFormatError(f"entry {entry.name!r} is damaged: {error}") from error
    if not inflater.eof:
        raise ModelFormatError(f"entry {entry.name!r} is cut off")


def _find_end(view: memoryview) -> int | None:
    """Return the offset of the end record, after which comes its comment and nothing else."""
    lowest = max(0, len(view) - END.size - MAX_16)
    tail = bytes(view[lowest:])
    at = len(tail) - END.size
    while (at := tail.rfind(END_MAGIC, 0, at + len(END_MAGIC))) >= 0:
        if at + END.size <= len(tail):
            comment_length = END.unpack_from(tail, at)[-1]
            if at + END.size + comment_length == len(tail):
                return lowest + at
        at -= 1
    return None


def _locate_directory(view: memoryview) -> _Directory:
    end = _find_end(view)
    if end is None:
        raise ModelFormatError("the archive is cut off: it has no directory at its end")
    _, disk, start_disk, here, entries, size, offset, _ = END.unpack_from(view, end)
    directory_end = end
    if end >= LOCATOR64.size and bytes(view[end - LOCATOR64.size : end][:4]) == LOCATOR64_MAGIC:
        _, locator_disk, directory_end, disks = LOCATOR64.unpack_from(view, end - LOCATOR64.size)
        if locator_disk or disks > 1 or directory_end + END64.size > end - LOCATOR64.size:
            raise ModelFormatError("the archive's ZIP64 locator points nowhere")
        magic, record_size, _, _, disk, start_disk, here, entries, size, offset = END64.unpack_from(view, directory_end)
        if magic != END64_MAGIC or directory_end + 12 + record_size != end - LOCATOR64.size:
            raise ModelFormatError("the archive's ZIP64 end record is damaged")
    if disk or start_disk or here != entries:
        raise ModelFormatError("the archive is split over several files")
    if offset + size != directory_end:
        raise ModelFormatError("the archive's directory is not where the end record says")
    return _Directory(offset=offset, size=size, entries=entries)


def _walk_directory(view: memoryview, directory: _Directory) -> Iterator[ZipEntry]:
    position, stop = directory.offset, directory.offset + directory.size
    for _ in range(directory.entries):
        if position + CENTRAL.size > stop:
            raise ModelFormatError("the archive's directory is cut off")
        fields = CENTRAL.unpack_from(view, position)
        name_end = position + CENTRAL.size + fields[10]
        extra_end = name_end + fields[11]
        next_position = extra_end + fields[12]
        if fields[0] != CENTRAL_MAGIC or next_position > stop:
            raise ModelFormatError("the archive's directory is damaged")
        raw_name = bytes(view[position + CENTRAL.size : name_end])
        yield _read_central(view, fields, raw_name, bytes(view[name_end:extra_end]), directory)
        position = next_position
    if position != stop:
        raise ModelFormatError("the archive's directory holds more than its entries")


def _read_central(
    view: memoryview, fields: tuple[int, ...], raw_name: bytes, extra: bytes, directory: _Directory
) -> ZipEntry:
    _, made_by, _, flags, method, _, _, crc, compressed_size, size, *rest = fields
    disk, external, header_offset = rest[3], rest[5], rest[6]
    name = _decode_name(raw_name, flags)
    size, compressed_size, header_offset = _zip64_fields(name, extra, size, compressed_size, header_offset)
    if flags & _FLAGS_ENCRYPTED:
        raise ModelFormatError(f"entry {name!r} is encrypted")
    if method not in {STORED, DEFLATED}:
        raise ModelFormatError(f"entry {name!r} is compressed by method {method}, which is not supported")
    if made_by >> 8 == 3 and stat.S_ISLNK(external >> 16):
        raise ModelFormatError(f"entry {name!r} is a symbolic link")
    if disk:
        raise ModelFormatError("the archive is split over several files")
    if method == STORED and size != compressed_size:
        raise ModelFormatError(f"entry {name!r} is stored, but its two sizes differ")
    if method == DEFLATED and size > compressed_size * _MAX_RATIO:
        raise ModelFormatError(f"entry {name!r} claims to inflate further than deflate can")
    entry = ZipEntry(
        name=name,
        method=method,
        crc=crc,
        compressed_size=compressed_size,
        size=size,
        header_offset=header_offset,
        data_offset=_data_offset(view, header_offset, raw_name, method, directory),
    )
    if entry.data_end > directory.offset:
        raise ModelFormatError(f"entry {name!r} reaches into the archive's directory")
    return entry


def _decode_name(raw: bytes, flags: int) -> str:
    try:
        # The two agree on ASCII, and cp437 is a module to import, in every task anew.
        name = raw.decode("utf-8" if flags & FLAG_UTF8 or raw.isascii() else "cp437")
    except UnicodeDecodeError as error:
        raise ModelFormatError("an entry's name is not UTF-8") from error
    # In UTF-8, as it would be written again, a name of cp437 takes up to three times the bytes.
    if not name or "\0" in name or len(name.encode()) > MAX_16:
        raise ModelFormatError("an entry has no usable name")
    return name


def _zip64_fields(name: str, extra: bytes, *values: int) -> Iterator[int]:
    """Replace the values that overflow 32 bits by those of the ZIP64 extra field, in their order there."""
    wide = b""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == ZIP64_EXTRA:
            wide = extra[position + 4 : position + 4 + length]
        position += 4 + length
    for value in values:
        if value != MAX_32:
            yield value
            continue
        if len(wide) < 8:
            raise ModelFormatError(f"entry {name!r} lacks its ZIP64 sizes")
        yield struct.unpack_from("<Q", wide)[0]
        wide = wide[8:]


def _data_offset(view: memoryview, offset: int, raw_name: bytes, method: int, directory: _Directory) -> int:
    """Return where an entry's data begins, after checking its local header against the directory."""
    if offset + LOCAL.size > directory.offset:
        raise ModelFormatError("an entry begins outside of the archive's data")
    magic, _, flags, local_method, _, _, _, _, _, name_length, extra_length = LOCAL.unpack_from(view, offset)
    name_start = offset + LOCAL.size
    if (
        magic != LOCAL_MAGIC
        or flags & _FLAGS_ENCRYPTED
        or local_method != method
        or bytes(view[name_start : name_start + name_length]) != raw_name
    ):
        raise ModelFormatError("an entry's own header and the archive's directory disagree")
    return int(name_start + name_length + extra_length)


def _refuse_overlap(entries: dict[str, ZipEntry], directory: _Directory) -> None:
    """Refuse archives whose entries share bytes, the trick behind the densest zip bombs."""
    free_from = 0
    for entry in sorted(entries.values(), key=lambda entry: entry.header_offset):
        if entry.header_offset < free_from:
            raise ModelFormatError(f"entry {entry.name!r} overlaps another")
        free_from = entry.data_end
    if free_from > directory.offset:
        raise ModelFormatError("the entries overlap the archive's directory")
