"""numpyhelper: a list of arrays as .npz."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from scaleout_mp.model.entry_sink import EntrySink
from scaleout_mp.model.helpers.base import DescriptorSink, FileSink, Source, Target, read_bytes
from scaleout_mp.model.npz import NPZ_LIMITS, Array, read_arrays, write_arrays
from scaleout_mp.model.numpy_used import np
from scaleout_mp.model.streams import ViewStream

if TYPE_CHECKING:
    from scaleout_mp.model.zip_reader import ArchiveLimits

Weights = Sequence[Any]


class ListArithmetic:
    """What aggregators do with lists of arrays, array by array. Nothing is changed in place.

    Two lists of different length are refused with ValueError.
    """

    def increment_average(self, m1: Weights, m2: Weights, n: float, N: float) -> list[Any]:  # noqa: N803
        """Return m1 + n * (m2 - m1) / N: the mean over N examples, n of which m2 saw."""
        return self._pairwise(lambda x, y: np.add(x, n * (np.asarray(y) - x) / N), m1, m2)

    def add(self, m1: Weights, m2: Weights, a: float = 1.0, b: float = 1.0) -> list[Any]:
        """Return a * m1 + b * m2."""
        return self._pairwise(lambda x, y: np.asarray(x) * a + np.asarray(y) * b, m1, m2)

    def subtract(self, m1: Weights, m2: Weights, a: float = 1.0, b: float = 1.0) -> list[Any]:
        """Return a * m1 - b * m2."""
        return self.add(m1, m2, a, -b)

    def multiply(self, m1: Weights, m2: Weights) -> list[Any]:
        """Return m1 * m2."""
        return self._pairwise(np.multiply, m1, m2)

    def divide(self, m1: Weights, m2: Weights) -> list[Any]:
        """Return m1 / m2."""
        return self._pairwise(np.divide, m1, m2)

    def sqrt(self, m1: Weights) -> list[Any]:
        """Return the square roots."""
        return [np.sqrt(x) for x in m1]

    def power(self, m1: Weights, a: float) -> list[Any]:
        """Return m1 to the power of a."""
        return [np.power(x, a) for x in m1]

    def sign(self, m1: Weights) -> list[Any]:
        """Return the signs: -1, 0 or 1."""
        return [np.sign(x) for x in m1]

    def ones(self, m1: Weights, a: float) -> list[Any]:
        """Return arrays of the shapes of m1 filled with a; float64, as the published helper has it."""
        return [np.full(np.shape(x), float(a)) for x in m1]

    def norm(self, m1: Weights) -> float:
        """Return the sum of the arrays' 1-norms; a matrix's is its largest column sum."""
        return float(sum((np.linalg.norm(x, 1) for x in m1), 0.0))

    @staticmethod
    def _pairwise(operation: Callable[[Any, Any], Any], m1: Weights, m2: Weights) -> list[Any]:
        return [operation(x, y) for x, y in zip(m1, m2, strict=True)]


class NumpyHelper(ListArithmetic):
    """A list of arrays of any plain dtype, stored as an uncompressed .npz."""

    name = "numpyhelper"

    def save(self, weights: Sequence[Any], target: Target) -> None:
        """Write arrays to a path or an open file, with each array's data aligned to 64 bytes."""
        if isinstance(target, EntrySink):
            write_arrays(weights, target)
        elif isinstance(target, str | os.PathLike):
            with open(target, "wb", buffering=0) as file:
                write_arrays(weights, DescriptorSink(file.fileno()))
        else:
            write_arrays(weights, FileSink(target))

    def load(self, source: Source, *, limits: ArchiveLimits | None = None) -> list[Array]:
        """Return the arrays, read-only: views of the source's bytes wherever they are stored uncompressed.

        `limits` on the archive; those of the model when the source is one's stream, else `NPZ_LIMITS`.
        """
        view, vouched = read_bytes(source)
        if limits is None and isinstance(source, ViewStream):
            limits = source.limits
        return read_arrays(view, verify=not vouched, limits=limits or NPZ_LIMITS)
