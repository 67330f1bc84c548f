"""What a task finds around it: where it starts, and where its scratch folder lies."""

from __future__ import annotations

import dataclasses
import os
from typing import Final

from scaleout_mp.errors import ConfigError

#: Values of `working_directory` that are no paths.
SCRATCH: Final = "scratch"
INHERIT: Final = "inherit"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surroundings:
    """The same for every task of an executor. Raises ConfigError that names the field."""

    #: Folder in which the tasks' scratch folders are made; None: the temp folder.
    scratch_folder: str | os.PathLike[str] | None = None
    #: Where tasks start: "scratch", the task's own folder; "inherit", where the program stands; or a path.
    #: None: "scratch", but "inherit" at level "none".
    working_directory: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        for field in ("scratch_folder", "working_directory"):
            value = getattr(self, field)
            if value is not None and not isinstance(value, str | os.PathLike):
                raise ConfigError(f"{field} must be a path, not {value!r}")
        if self.scratch_folder is not None:
            _require_folder("scratch_folder", self.scratch_folder)
        if self.working_directory not in {None, SCRATCH, INHERIT}:
            assert self.working_directory is not None
            _require_folder("working_directory", self.working_directory)
            # Meant as seen from here: the program may stand elsewhere by the time of the first task.
            object.__setattr__(self, "working_directory", os.path.abspath(self.working_directory))

    def start_folder(self, scratch: str, *, inherit: bool) -> str:
        """Return where a task starts, "" for where the program stands; `inherit` says what None means."""
        wanted = self.working_directory
        if wanted is None:
            wanted = INHERIT if inherit else SCRATCH
        if wanted == INHERIT:
            return ""
        return scratch if wanted == SCRATCH else os.fspath(wanted)


def _require_folder(field: str, path: str | os.PathLike[str]) -> None:
    if not os.path.isdir(path):
        raise ConfigError(f"{field}: there is no folder {os.fspath(path)!r}")
