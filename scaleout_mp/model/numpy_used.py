"""numpy, imported when something of it is first used.

A client that waits for its first task has not needed it yet, and on a small device its 10 MB count. Where tasks are
forked from, it is imported with the user's code.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    import numpy as np
    from numpy.lib import format as npy_format
else:

    class _WhenUsed:
        """Stands for a module."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            value = getattr(importlib.import_module(self._name), attribute)
            # The next look finds it here.
            setattr(self, attribute, value)
            return value

    np = _WhenUsed("numpy")
    npy_format = _WhenUsed("numpy.lib.format")


def is_array(value: Any) -> TypeGuard[np.ndarray[Any, Any]]:
    """Whether a value is a numpy array."""
    return "numpy" in sys.modules and isinstance(value, np.ndarray)


def is_scalar(value: Any) -> TypeGuard[np.generic]:
    """Whether a value is a numpy scalar."""
    return "numpy" in sys.modules and isinstance(value, np.generic)


def is_masked(array: np.ndarray[Any, Any]) -> bool:
    """Whether an array is a masked one. Imports nothing for it."""
    masked = sys.modules.get("numpy.ma")
    return masked is not None and isinstance(array, masked.MaskedArray)


__all__ = ["is_array", "is_masked", "is_scalar", "np", "npy_format"]
