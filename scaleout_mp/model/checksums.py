"""CRC-32 of large data in one pass, also when the pieces' own checksums are wanted."""

from __future__ import annotations

import zlib
from typing import Final

#: The CRC-32 polynomial, bits reversed, as in zlib and PKZIP.
_POLYNOMIAL: Final = 0xEDB88320


def crc32(data: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """Return the CRC-32 of what `crc` stands for, followed by `data`."""
    return zlib.crc32(data, crc)


def crc32_combine(first: int, second: int, second_length: int) -> int:
    """Return the CRC-32 of two pieces laid end to end from the CRC-32 of each.

    Appending n bytes multiplies the first CRC by x^(8n) modulo the polynomial; the same method as zlib's
    crc32_combine.
    """
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
