"""The user's program, as far as a task has to resemble it: where modules are found, and what `__main__` is."""

from __future__ import annotations

import dataclasses
import os
import sys
import types
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Script:
    """Sent by the supervisor. Paths are bytes: file names need not be text."""

    #: None: the interpreter's own.
    search_path: list[bytes] | None = dataclasses.field(default_factory=list)
    #: Folders that come before it.
    first: list[bytes] = dataclasses.field(default_factory=list)
    #: File of the program's `__main__`; None for an interactive one.
    main_file: bytes | None = None
    #: The user's PYTHONPATH; None: not set.
    python_path: bytes | None = None

    def completed(self) -> Self:
        """Return what has to be sent on to another interpreter of the same environment."""
        rest = [os.fsencode(entry) for entry in sys.path] if self.search_path is None else self.search_path
        return dataclasses.replace(self, search_path=[*self.first, *rest], first=[])

    def apply_search_path(self) -> None:
        """Find modules where the program finds them, here and in programs that are started."""
        assert self.search_path is not None, "only what is completed can be applied"
        sys.path[:] = [os.fsdecode(entry) for entry in self.search_path]
        if self.python_path is None:
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environb[b"PYTHONPATH"] = self.python_path

    def apply_main(self, function: Callable[..., Any]) -> None:
        """Make a `__main__` that holds what the callable came with.

        What is defined in a script is sent by value and says it is of `__main__`. A pool in the task that sends such a
        function on by its name must find it there.
        """
        main = types.ModuleType("__main__")
        if self.main_file is not None:
            main.__file__ = os.fsdecode(self.main_file)
        for namespace in _main_namespaces(function):
            main.__dict__.update(namespace)
        main.__dict__["__name__"] = "__main__"
        sys.modules["__main__"] = main


def _main_namespaces(value: Any, depth: int = 4) -> Iterator[dict[str, Any]]:
    """Yield what belongs to `__main__` in a callable and the callables that it wraps."""
    if isinstance(value, types.FunctionType):
        if value.__module__ == "__main__":
            yield value.__globals__
            yield {value.__name__: value}
        return
    if depth == 0:
        return
    kind = value if isinstance(value, type) else type(value)
    if kind.__module__ == "__main__":
        yield {kind.__name__: kind}
        for member in vars(kind).values():
            yield from _main_namespaces(member, 0)
    for name in ("callback", "func", "__func__", "__self__", "__wrapped__"):
        inner = getattr(value, name, None)
        if inner is not None:
            yield from _main_namespaces(inner, depth - 1)
