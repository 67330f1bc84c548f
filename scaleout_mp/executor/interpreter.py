"""Which Python runs the template and the tasks, and where it finds modules."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Environment:
    """A Python environment that is not the program's. It needs numpy and msgpack, no more."""

    #: Its interpreter.
    executable: str
    #: Folder in which it finds this package and nothing else: what lies beside the package is the program's.
    package_root: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interpreter:
    """A Python for tasks."""

    #: None: that of the program, which finds what the program finds.
    environment: Environment | None = None
    #: Folders in which modules are looked for first.
    modules: Sequence[str] = ()

    def script_fields(self, of_program: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the template is told about its modules, see `worker.script.Script`."""
        first = [os.fsencode(folder) for folder in self.modules]
        if self.environment is None:
            return {**of_program, "first": first}
        root = os.fsencode(self.environment.package_root)
        return {"search_path": None, "main_file": None, "python_path": root, "first": first}
