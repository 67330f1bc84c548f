"""CRC-32 of large data in one pass, also when the pieces' own checksums are wanted.

With `isal` (extra `fast`) both functions are several times faster. It is imported for the first large piece, so
that a process without large models never loads it.
"""

from __future__ import annotations

import functools
import zlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from types import ModuleType

#: The CRC-32 polynomial, bits reversed, as in zlib and PKZIP.
_POLYNOMIAL: Final = 0xEDB88320

#: Below this many bytes the import would cost more than it saves.
_LARGE: Final = 1 << 20


@functools.cache
def fast_zlib() -> ModuleType | None:
    """Return isal's counterpart of zlib, or None where it is not installed."""
    try:
        from isal import isal_zlib
    except ImportError:
        return None
    module: ModuleType = isal_zlib
    return module


def crc32(data: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """Return the CRC-32 of what `crc` stands for, followed by `data`."""
    fast = fast_zlib() if len(data) >= _LARGE else None
    return zlib.crc32(data, crc) if fast is None else int(fast.crc32(data, crc))


def crc32_combine(first: int, second: int, second_length: int) -> int:
    """Return the CRC-32 of two pieces laid end to end from the CRC-32 of each.

    Appending n bytes multiplies the first CRC by x^(8n) modulo the polynomial; the same method as zlib's
    crc32_combine.
    """
    fast = fast_zlib() if second_length >= _LARGE else None
    if fast is not None:
        return int(fast.crc32_combine(first, second, second_length))
    return _multiply(_power_of_x(8 * second_length), first) ^ second


def _multiply(a: int, b: int) -> int:
    """Multiply two polynomials modulo the CRC polynomial; the highest bit is x^0."""
    product = 0
    bit = 1 << 31
    while bit:
        if a & bit:
            product ^= b
        bit >>= 1
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


def _squares() -> tuple[int, ...]:
    """Return x^(2^k) for k = 0..31; the order of x divides 2^32 - 1, so the sequence repeats after that."""
    powers = [1 << 30]
    while len(powers) < 32:
        powers.append(_multiply(powers[-1], powers[-1]))
    return tuple(powers)


_SQUARES: Final = _squares()


def _power_of_x(exponent: int) -> int:
    result = 1 << 31
    index = 0
    while exponent:
        if exponent & 1:
            result = _multiply(_SQUARES[index % 32], result)
        exponent >>= 1
        index += 1
    return result
