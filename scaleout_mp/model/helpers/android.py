"""androidhelper: one flat vector of float32, as raw bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scaleout_mp.model.helpers.base import Source, Target, write_bytes
from scaleout_mp.model.helpers.binary import flat_vector

if TYPE_CHECKING:
    from scaleout_mp.model.npz import Array


class AndroidHelper:
    """One flat vector, float32 in native byte order in the file and float64 in memory."""

    name = "androidhelper"

    def increment_average(self, m1: Any, m2: Any, n: float, N: float) -> Array:  # noqa: N803
        """Return m1 + n * (m2 - m1) / N: the mean over N examples, n of which m2 saw."""
        first = np.asarray(m1)
        return np.asarray(first + n * (np.asarray(m2) - first) / N)

    def save(self, weights: Any, target: Target) -> None:
        """Write a flat vector to a path or an open file."""
        write_bytes(target, np.asarray(weights, dtype=np.float32).reshape(-1).tobytes())

    def load(self, source: Source) -> Array:
        """Return the vector as float64, as the published helper does."""
        return flat_vector(source, np.dtype(np.float32)).astype(np.float64)
