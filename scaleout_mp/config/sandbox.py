"""How much a task is confined, as a user says it."""

from __future__ import annotations

import dataclasses
import enum
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, Literal

from scaleout_mp.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


class Level(enum.StrEnum):
    """How much a task is confined, apart from its limits. Each has what those before it have."""

    #: Limits only.
    NONE = "none"
    #: No new privileges, and a filter for system calls that reach other processes or the machine.
    BASIC = "basic"
    #: No way to signal or look into processes outside: all that breaks no training code.
    AUTO = "auto"
    #: Only the files that training code needs and those that are declared, and no network unless it is declared.
    STRICT = "strict"


LevelName = Literal["auto", "none", "basic", "strict"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sandbox:
    """Confinement of tasks, where a level alone does not say enough.

    `read` and `write` name files and folders that tasks may use besides the interpreter, the libraries, the modules
    on the search path and their scratch folder; `network` lets them use the network. These three say something at
    level "strict" only: elsewhere a task may do all that its user may. A wrong value is a ConfigError.
    """

    level: LevelName = "strict"
    read: Sequence[str | os.PathLike[str]] = ()
    write: Sequence[str | os.PathLike[str]] = ()
    network: bool = False

    def __post_init__(self) -> None:
        level = level_of(self.level)
        if type(self.network) is not bool:
            raise ConfigError(f"sandbox: network must be True or False, not {self.network!r}")
        for field in ("read", "write"):
            paths = getattr(self, field)
            if isinstance(paths, str | os.PathLike | bytes) or not isinstance(paths, Iterable):
                raise ConfigError(f"sandbox: {field} must be a list of paths, not {paths!r}")
            object.__setattr__(self, field, tuple(_existing(path, field) for path in paths))
        if level is not Level.STRICT and (self.read or self.write or self.network):
            raise ConfigError(
                f'sandbox: read, write and network are for level "strict"; at level "{self.level}" files and network '
                "are free"
            )


def _existing(path: object, field: str) -> str:
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"sandbox: {field} must be a list of paths; {path!r} is none")
    absolute = os.path.abspath(os.path.expanduser(os.fspath(path)))
    if not os.path.exists(absolute):
        raise ConfigError(f"sandbox: {field} names {os.fspath(path)!r}, which is not there")
    return absolute


def level_of(name: object) -> Level:
    """Return the level of that name. Raises ConfigError."""
    if not isinstance(name, str) or name not in list(Level):
        raise ConfigError(f"sandbox must be one of {', '.join(map(repr, LEVELS))}, or a Sandbox, not {name!r}")
    return Level(name)


def as_sandbox(choice: Sandbox | str) -> Sandbox:
    """Return what a user's choice means. Raises ConfigError."""
    if isinstance(choice, Sandbox):
        return choice
    return Sandbox(level=level_of(choice).value)


#: In the order in which they are documented.
LEVELS: Final = tuple(level.value for level in (Level.AUTO, Level.NONE, Level.BASIC, Level.STRICT))
