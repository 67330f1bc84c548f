"""What a task finds around it: where it starts, where its scratch folder lies, and its environment."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.config.checks import require_flag
from scaleout_mp.config.machine import THREAD_VARIABLES
from scaleout_mp.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Values of `working_directory` that are no paths.
SCRATCH: Final = "scratch"
INHERIT: Final = "inherit"

#: Variables that each task gets for itself, and what is there to choose their values.
_OURS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("TEMP", "TMP", "TMPDIR"), "scratch_folder="),
    **dict.fromkeys(THREAD_VARIABLES, "Limits(threads=)"),
    "PYTHONPATH": "sys.path of the program",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surroundings:
    """The same for every task of an executor. Raises ConfigError that names the field."""

    #: Folder in which the tasks' scratch folders are made; None: the temp folder.
    scratch_folder: str | os.PathLike[str] | None = None
    #: Where tasks start: "scratch", the task's own folder; "inherit", where the program stands; or a path.
    #: None: "scratch", but "inherit" at level "none".
    working_directory: str | os.PathLike[str] | None = None
    #: Variables that tasks have in addition, or instead of the program's.
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    #: Names of variables of the program that tasks get though they are not on the allow list; with "*" for a part of
    #: a name. Level "none" passes all.
    pass_environment: Sequence[str] = ()
    #: Whether the program is closed to other processes of its user while tasks may run, see `sandbox.shield`.
    shield: bool = False

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
        _check_environment(self.environment)
        given: object = self.pass_environment
        names = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [None]
        if not all(isinstance(name, str) for name in names):
            raise ConfigError(f"pass_environment must be a list of names, not {given!r}")
        object.__setattr__(self, "pass_environment", tuple(names))
        require_flag("shield", self.shield)

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


def _is_passable(text: str) -> bool:
    try:
        # As `os.environ` has it: surrogates that stand for bytes which are no UTF-8 are fine, no others.
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _check_environment(environment: Any) -> None:
    if not isinstance(environment, Mapping):
        raise ConfigError(f"environment must be a dict, not {type(environment).__name__}")
    for name, value in environment.items():
        if not isinstance(name, str) or not name or "=" in name or not _is_passable(name):
            raise ConfigError(f"environment: {name!r} is no name of a variable")
        # The value stays out of messages: it may be a secret.
        if not isinstance(value, str) or not _is_passable(value):
            raise ConfigError(
                f"environment: the value of {name} must be a string that can be encoded, without null characters"
            )
        if name in _OURS:
            raise ConfigError(f"environment: {name} is set for each task; use {_OURS[name]}")
