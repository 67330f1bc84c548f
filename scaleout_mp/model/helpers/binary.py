"""binaryhelper: one flat vector of float64, as raw bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scaleout_mp.errors import ModelFormatError
from scaleout_mp.model.helpers.base import Source, Target, read_bytes, write_bytes
from scaleout_mp.model.helpers.numeric import ListArithmetic
from scaleout_mp.model.numpy_used import np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scaleout_mp.model.npz import Array


class BinaryHelper(ListArithmetic):
    """One flat float64 vector in native byte order; shapes are not kept."""

    name = "binaryhelper"

    def save(self, weights: Sequence[Any], target: Target) -> None:
        """Write arrays, flattened and laid end to end as float64, to a path or an open file."""
        arrays = [np.asarray(item, dtype=np.float64).reshape(-1) for item in weights]
        flat = np.concatenate(arrays) if arrays else np.empty(0)
        write_bytes(target, flat.tobytes())

    def load(self, source: Source) -> list[Array]:
        """Return a list with the one vector, read-only."""
        return [flat_vector(source, np.dtype(np.float64))]


def flat_vector(source: Source, dtype: np.dtype[Any]) -> Array:
    """Return all bytes of a source as one read-only vector."""
    view, _ = read_bytes(source)
    if len(view) % dtype.itemsize:
        raise ModelFormatError(f"{len(view):,} bytes are not a whole number of {dtype.name} values")
    if not len(view):
        return np.empty(0, dtype)
    vector = np.frombuffer(view, dtype)
    if not vector.flags.aligned:
        # Other writers do not align; extensions that take a pointer may rely on it.
        vector = vector.copy()
        vector.flags.writeable = False
    return vector
