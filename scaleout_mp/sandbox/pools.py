"""Thread pools of numerical libraries: none in the template, as many threads as wanted in a task.

A pool that exists at a fork is not there in the child, whose first large product would wait for it for ever. So the
template starts with one thread by environment variables, and each task raises the number again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

#: What the libraries read when they are loaded.
VARIABLES: Final = (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)

#: Part of a library's file name -> names of its function, the first one that exists counts.
_SETTERS: Final = {
    "openblas": (
        "scipy_openblas_set_num_threads64_",
        "scipy_openblas_set_num_threads",
        "openblas_set_num_threads64_",
        "openblas_set_num_threads",
    ),
    "libmkl_rt": ("MKL_Set_Num_Threads",),
    "libgomp": ("omp_set_num_threads",),
    "libomp": ("omp_set_num_threads",),
    "libiomp": ("omp_set_num_threads",),
    "libblis": ("bli_thread_set_num_threads",),
}


def loaded_setters() -> list[Callable[[int], Any]]:
    """Return the functions of the loaded libraries that set their number of threads. Takes a millisecond or two."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        paths = sorted({line.split(maxsplit=5)[5].rstrip("\n") for line in file if ".so" in line})
    setters = []
    for path in paths:
        names = next((names for part, names in _SETTERS.items() if part in os.path.basename(path)), ())
        if not names:
            continue
        # A library that was deleted or replaced on disk cannot be opened again by its name.
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(path)
            name = next((name for name in names if hasattr(library, name)), None)
            if name is not None:
                setters.append(getattr(library, name))
    return setters


def set_threads(setters: list[Callable[[int], Any]], count: int) -> None:
    """Give the pools of this process `count` threads, and those of programs that it starts."""
    for name in VARIABLES:
        os.environ[name] = str(count)
    for setter in setters:
        setter(count)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(count)
