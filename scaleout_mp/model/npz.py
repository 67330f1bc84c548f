"""Lists of numpy arrays as an .npz archive with the members 0.npy, 1.npy, ...

Stored members come back as read-only views of the archive's own bytes. Pickled objects are refused in both
directions. The .npy header is that of numpy's NEP 1.
"""

from __future__ import annotations

import ast
import math
import re
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

from scaleout_mp.errors import ModelFormatError
from scaleout_mp.model import zip_reader
from scaleout_mp.model.deflate import sample_of
from scaleout_mp.model.entry_sink import EntrySink
from scaleout_mp.model.numpy_used import np, npy_format
from scaleout_mp.model.zip_reader import ArchiveLimits
from scaleout_mp.model.zip_writer import ALIGNMENT, ScanSink, Sink, ZipWriter

if TYPE_CHECKING:
    from scaleout_mp.model.memfd import Bytes

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

#: For weights that do not come in a container with limits of its own.
NPZ_LIMITS: Final = ArchiveLimits(max_entries=1 << 17)

#: An array that does not lie in one piece is gathered in blocks of so many bytes.
_GATHER_AT_ONCE: Final = 16 << 20

#: numpy.dtype.isbuiltin of a type that another package registered.
_OF_AN_EXTENSION: Final = 2

_MAGIC: Final = b"\x93NUMPY"
_MAX_HEADER: Final = (1 << 16) - 1
_HEADER_KEYS: Final = {"descr", "fortran_order", "shape"}
_MAX_DIMENSIONS: Final = 64
# Byte order, kind, item size, unit of a time: what numpy writes. No O: a pickled object runs code when read.
_PLAIN_DTYPE: Final = re.compile(r"[<>|=]?[?bBiufcmMSUV]\d{0,9}(\[\d{0,9}[a-zA-Z]{1,2}\])?")
_COMMON_HEADER: Final = re.compile(
    rb"\{'descr': '([<>|=]?[a-zA-Z?][0-9]{0,9})', 'fortran_order': (True|False), "
    rb"'shape': \(([0-9]{1,19},|[0-9]{1,19}(?:, [0-9]{1,19})+|)\)(?:, )?\}[ ]*\n?"
)


def write_arrays(arrays: Iterable[Any], sink: Sink) -> None:
    """Write whatever numpy takes as arrays, uncompressed, each one's data at a 64-byte boundary.

    Arrays are written out of their own memory; nobody may change them meanwhile.
    """
    if isinstance(arrays, Mapping | str | bytes):
        raise TypeError(f"the weights must be a list of arrays, not {type(arrays).__name__}")
    # Not asanyarray: a matrix cannot be laid flat.
    encoded = [EncodedArray(np.asarray(item), label=f"array {index}") for index, item in enumerate(arrays)]
    if not isinstance(sink, EntrySink):
        _write_encoded(encoded, sink)
    elif sink.decide(_sample(encoded), sum(item.array.nbytes for item in encoded)):
        # The entry's header stands before the arrays and has their CRC-32. With that known beforehand, all is
        # written, and hashed where that is asked for, in the order in which it lies.
        scan = ScanSink()
        sums = _write_encoded(encoded, scan)
        sink.announce(size=scan.size, crc=scan.crc)
        _write_encoded(encoded, sink, sums)
    else:
        _write_encoded(encoded, sink)


def _write_encoded(encoded: list[EncodedArray], sink: Sink, sums: Sequence[int] | None = None) -> list[int]:
    """Write the archive and return the CRC-32 of each member; `sums`: when they are known already."""
    writer = ZipWriter(sink)
    found = [
        writer.add_blocks(f"{index}.npy", item.blocks, item.size, crc=sums[index] if sums else None, align=True)
        for index, item in enumerate(encoded)
    ]
    writer.finish()
    return found


class _Scattered:
    """The bytes of an array that does not lie in one piece, to take a few of."""

    def __init__(self, array: Array) -> None:
        self._array = array
        self.nbytes = array.nbytes

    def __getitem__(self, part: slice, /) -> memoryview:
        items = slice(part.start // self._array.itemsize, -(-part.stop // self._array.itemsize))
        return np.asarray(self._array.flat[items]).view(np.uint8).data[: part.stop - part.start]


def _sample(encoded: list[EncodedArray]) -> list[memoryview]:
    return sample_of([_Scattered(item.array) if item.data is None else item.data for item in encoded])


class EncodedArray:
    """An array as a .npy file: a header, and the array's own memory."""

    def __init__(self, array: Array, *, label: str = "array") -> None:
        if array.dtype.hasobject:
            raise ModelFormatError(f"{label} has the dtype object; models hold plain numbers")
        if not (array.flags.c_contiguous or array.flags.f_contiguous) and array.nbytes < _GATHER_AT_ONCE:
            array = np.ascontiguousarray(array)
        fields = npy_format.header_data_from_array_1_0(array)
        if array.dtype.isbuiltin == _OF_AN_EXTENSION:
            # Some describe themselves by what numpy cannot read: float8_e5m2 says "<f1".
            fields["descr"] = f"|V{array.dtype.itemsize}"
        self.array = array
        self.header = _write_header(fields, label)
        #: The array's bytes in their order in the file; None when they lie too far apart to be one view.
        self.data = _flat(array, fortran=fields["fortran_order"])

    @property
    def size(self) -> int:
        """Length of the file in bytes."""
        return len(self.header) + self.array.nbytes

    def blocks(self) -> Iterator[Bytes]:
        """Yield the file's bytes."""
        yield self.header
        if self.data is not None:
            yield self.data
            return
        # A piece at a time: a large array must not stand in memory twice.
        flags: Any = ["external_loop", "buffered"]
        size = max(1, _GATHER_AT_ONCE // self.array.itemsize)
        for piece in np.nditer(self.array, flags=flags, buffersize=size, order="C"):
            yield np.asarray(piece).tobytes()


def _flat(array: Array, *, fortran: bool) -> memoryview | None:
    if not array.nbytes:
        return memoryview(b"")
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        return None
    flat = (array.T if fortran else array).reshape(-1)
    return np.asarray(flat).view(np.uint8).data


def read_arrays(view: memoryview, *, verify: bool = True, limits: ArchiveLimits = NPZ_LIMITS) -> list[Array]:
    """Return the arrays in order, read-only.

    `verify`: compare the CRC-32 of stored members; leave it out only when the bytes around them were
    compared.
    """
    entries = zip_reader.read_directory(view, limits)
    arrays = []
    for index in range(len(entries)):
        entry = entries.get(f"{index}.npy")
        if entry is None:
            raise ModelFormatError(f"the weights lack {index}.npy among {len(entries)} arrays")
        arrays.append(decode_array(zip_reader.read_entry(entry.raw(view), entry, verify=verify), label=entry.name))
    return arrays


def decode_array(data: memoryview, *, label: str = "array") -> Array:
    """Return the array that the bytes of one .npy file hold, as a read-only view of them."""
    dtype, fortran_order, shape, start = _read_header(data, label)
    expected = math.prod(shape) * dtype.itemsize
    if expected != len(data) - start:
        raise ModelFormatError(f"{label} has {len(data) - start:,} bytes of data, its header asks for {expected:,}")
    # Through frombuffer, which holds an export of the buffer for the array's life: given a memoryview,
    # numpy.ndarray keeps only a reference to the owner, which could be unmapped or resized under the array.
    flat = np.frombuffer(data[start:], np.uint8) if expected else np.empty(0, np.uint8)
    try:
        array: Array = np.ndarray(shape, dtype, buffer=flat, order="F" if fortran_order else "C")
    except (ValueError, TypeError, OverflowError) as error:
        raise ModelFormatError(f"{label} has an impossible shape or dtype: {error}") from error
    if not array.flags.aligned:
        # Other writers do not align; extensions that take a pointer may rely on it.
        array = array.copy(order="K")
    array.flags.writeable = False
    return array


def _write_header(fields: Mapping[str, Any], label: str) -> bytes:
    """Return the header in the oldest version that can hold it, padded so that data after it is aligned."""
    text = repr({key: fields[key] for key in ("descr", "fortran_order", "shape")})
    version, encoded = (1, text.encode("latin1")) if text.isascii() else (3, text.encode())
    prefix = len(_MAGIC) + 2 + (2 if version == 1 else 4)
    encoded += b" " * (-(prefix + len(encoded) + 1) % ALIGNMENT) + b"\n"
    if len(encoded) > _MAX_HEADER:
        raise ModelFormatError(f"{label} has a dtype with too long a description")
    return _MAGIC + struct.pack("<BBH" if version == 1 else "<BBL", version, 0, len(encoded)) + encoded


def _read_header(data: memoryview, label: str) -> tuple[np.dtype[Any], bool, tuple[int, ...], int]:
    start = bytes(data[:12])
    if start[:6] != _MAGIC or len(start) < 12 or start[6] not in {1, 2, 3}:
        raise ModelFormatError(f"{label} is not a .npy file of version 1 to 3")
    if start[6] == 1:
        length, offset = struct.unpack_from("<H", start, 8)[0], 10
    else:
        length, offset = struct.unpack_from("<L", start, 8)[0], 12
    if length > _MAX_HEADER or offset + length > len(data):
        raise ModelFormatError(f"{label} has a header that is too long or cut off")
    text = bytes(data[offset : offset + length])
    fields = _read_common_fields(text)
    if fields is None:
        try:
            with warnings.catch_warnings():
                # Python's remarks on the style of somebody's header.
                warnings.simplefilter("ignore")
                fields = ast.literal_eval(text.decode("latin1" if start[6] < 3 else "utf-8").strip())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
            raise ModelFormatError(f"{label} has an unreadable header") from error
    if not isinstance(fields, dict) or set(fields) != _HEADER_KEYS:
        raise ModelFormatError(f"{label} has a header without the keys of a .npy file")
    shape, fortran_order = fields["shape"], fields["fortran_order"]
    if not isinstance(fortran_order, bool) or not _is_shape(shape):
        raise ModelFormatError(f"{label} has a malformed shape or order in its header")
    return _read_dtype(fields["descr"], label), fortran_order, shape, offset + length


def _read_common_fields(text: bytes) -> dict[str, Any] | None:
    """Read a header as numpy and we write it, without Python's parser, which takes longer than all the rest."""
    match = _COMMON_HEADER.fullmatch(text)
    if match is None:
        return None
    descr, fortran_order, shape = match.groups()
    lengths = tuple(int(length) for length in shape.split(b",") if length.strip())
    return {"descr": descr.decode(), "fortran_order": fortran_order == b"True", "shape": lengths}


def _is_shape(shape: object) -> bool:
    return (
        isinstance(shape, tuple)
        and len(shape) <= _MAX_DIMENSIONS
        and all(type(size) is int and 0 <= size < 1 << 63 for size in shape)
    )


def _read_dtype(description: object, label: str) -> np.dtype[Any]:
    if isinstance(description, str) and not _PLAIN_DTYPE.fullmatch(description):
        raise ModelFormatError(f"{label} has the dtype {description[:40]!r}, which is not a plain one")
    if not isinstance(description, str | list | tuple):
        raise ModelFormatError(f"{label} has no dtype in its header")
    try:
        dtype = npy_format.descr_to_dtype(cast("Any", description))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, SyntaxError) as error:
        raise ModelFormatError(f"{label} has an unreadable dtype: {error}") from error
    if dtype.hasobject:
        raise ModelFormatError(f"{label} has the dtype object; models hold plain numbers")
    return dtype
