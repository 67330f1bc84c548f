"""Thread pools of numerical libraries: none in the template, as many threads as wanted in a task.

A pool that exists at a fork is not there in the child, whose first large product would wait for it for ever. So the
template has no threads but its own, and each task starts what it needs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.config.machine import THREAD_VARIABLES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

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


def name_threads(count: int) -> None:
    """Tell libraries that are loaded from now on, here and in programs that are started, how many threads to have."""
    for name in THREAD_VARIABLES:
        os.environ[name] = str(count)


class Pools:
    """The pools of the libraries that this process has loaded."""

    def __init__(self) -> None:
        """Find them. Takes a millisecond or two."""
        self._lazy: list[Callable[[int], Any]] = []
        #: OpenBLAS starts its threads when it is told how many, which costs more than the start of a task.
        self._eager: list[Callable[[int], Any]] = []
        for path in _loaded_libraries():
            found = next(((part, names) for part, names in _SETTERS.items() if part in os.path.basename(path)), None)
            setter = None if found is None else _function(path, found[1])
            if found is not None and setter is not None:
                (self._eager if found[0] == "openblas" else self._lazy).append(setter)
        #: Threads that a fork of this process will have without being told.
        self._inherited = 1

    def prepare(self, count: int, fork: Callable[[], object], threads: Callable[[], int]) -> None:
        """Have forks of this process start `count` threads when they need them. Called in the template.

        OpenBLAS ends its threads before a fork and starts them again at the next product, in parent and child; the
        template makes no product. `fork` makes one fork, and `threads` counts this process's threads: a build that
        does not do so is left at one thread.
        """
        if count == 1 or not self._eager:
            return
        for setter in self._eager:
            setter(count)
        fork()
        if threads() == 1:
            self._inherited = count
            return
        for setter in self._eager:
            setter(1)

    def apply(self, count: int) -> None:
        """Give the pools of this process `count` threads, and those of programs that it starts. Called in a task."""
        if os.environ.get(THREAD_VARIABLES[0]) != str(count):
            name_threads(count)
        for setter in self._lazy:
            setter(count)
        if count != self._inherited:
            for setter in self._eager:
                setter(count)
        torch = sys.modules.get("torch")
        if torch is not None and torch.get_num_threads() != count:
            torch.set_num_threads(count)


def _loaded_libraries() -> list[str]:
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        return sorted({line.split(maxsplit=5)[5].rstrip("\n") for line in file if ".so" in line})


def _function(path: str, names: Iterable[str]) -> Callable[[int], Any] | None:
    # A library that was deleted or replaced on disk cannot be opened again by its name.
    with contextlib.suppress(OSError):
        library = ctypes.CDLL(path)
        return next((getattr(library, name) for name in names if hasattr(library, name)), None)
    return None
