"""androidhelper: one flat vector of float32, as raw bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scaleout_mp.model.helpers.base import Source, Target, write_bytes
from scaleout_mp.model.helpers.binary import flat_vector
from scaleout_mp.model.helpers.numeric import ListArithmetic
from scaleout_mp.model.numpy_used import np

if TYPE_CHECKING:
    from scaleout_mp.model.npz import Array

_LISTS = ListArithmetic()


class AndroidHelper:
    """One flat vector, float32 in native byte order in the file and float64 in memory.

    The arithmetic is that of lists of arrays, on the one vector.
    """

    name = "androidhelper"

    def increment_average(self, m1: Any, m2: Any, n: float, N: float) -> Array:  # noqa: N803
        """Return m1 + n * (m2 - m1) / N: the mean over N examples, n of which m2 saw."""
        return _vector(_LISTS.increment_average([np.asarray(m1)], [np.asarray(m2)], n, N))

    def add(self, m1: Any, m2: Any, a: float = 1.0, b: float = 1.0) -> Array:
        """Return a * m1 + b * m2."""
        return _vector(_LISTS.add([m1], [m2], a, b))

    def subtract(self, m1: Any, m2: Any, a: float = 1.0, b: float = 1.0) -> Array:
        """Return a * m1 - b * m2."""
        return _vector(_LISTS.subtract([m1], [m2], a, b))

    def multiply(self, m1: Any, m2: Any) -> Array:
        """Return m1 * m2."""
        return _vector(_LISTS.multiply([m1], [m2]))

    def divide(self, m1: Any, m2: Any) -> Array:
        """Return m1 / m2."""
        return _vector(_LISTS.divide([m1], [m2]))

    def sqrt(self, m1: Any) -> Array:
        """Return the square roots."""
        return _vector(_LISTS.sqrt([m1]))

    def power(self, m1: Any, a: float) -> Array:
        """Return m1 to the power of a."""
        return _vector(_LISTS.power([m1], a))

    def sign(self, m1: Any) -> Array:
        """Return the signs: -1, 0 or 1."""
        return _vector(_LISTS.sign([m1]))

    def ones(self, m1: Any, a: float) -> Array:
        """Return a vector of the length of m1 filled with a."""
        return _vector(_LISTS.ones([m1], a))

    def norm(self, m1: Any) -> float:
        """Return the vector's 1-norm."""
        return _LISTS.norm([m1])

    def save(self, weights: Any, target: Target) -> None:
        """Write a flat vector to a path or an open file."""
        write_bytes(target, np.asarray(weights, dtype=np.float32).reshape(-1).tobytes())

    def load(self, source: Source) -> Array:
        """Return the vector as float64, as the published helper does."""
        return flat_vector(source, np.dtype(np.float32)).astype(np.float64)


def _vector(one: list[Any]) -> Array:
    return np.asarray(one[0])
