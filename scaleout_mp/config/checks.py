"""Checks of values as users give them, for fields of more than one class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from scaleout_mp.errors import ConfigError

_SHOWN: Final = 100


def shown(value: object) -> str:
    """Return a wrong value as a message has it: in short, however long it is."""
    try:
        text = repr(value)
    except ValueError:
        # A whole number of more digits than Python is willing to print.
        return f"a {type(value).__name__} too large to be shown"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def require_flag(field: str, value: object) -> None:
    """Raise ConfigError unless `value` is True or False: any text, "no" as well, would count as True."""
    if type(value) is not bool:
        raise ConfigError(f"{field} must be True or False, not {shown(value)}")


def require_kind(kind: type, **fields: object) -> None:
    """Raise ConfigError that names the field unless each value is None or a `kind`."""
    for field, value in fields.items():
        if value is not None and not isinstance(value, kind):
            raise ConfigError(f"{field} must be a {kind.__name__}, not {shown(value)}")


def require_name(**fields: object) -> None:
    """Raise ConfigError that names the field unless each value is None or a string that says something."""
    for field, value in fields.items():
        if value is not None and (not isinstance(value, str) or not value):
            raise ConfigError(f"{field} must be a string that says something, not {shown(value)}")


def parse_modules(field: str, names: object) -> tuple[str, ...]:
    """Return the names of modules. Raises ConfigError: a string is a sequence of names as well, of one letter each."""
    given = list(names) if isinstance(names, Sequence) and not isinstance(names, str | bytes) else [None]
    if not all(isinstance(name, str) and name for name in given):
        raise ConfigError(f'{field} must be a list of names of modules, like ["numpy"], not {shown(names)}')
    return tuple(map(str, given))
