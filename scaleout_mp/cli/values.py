"""Values of options, which are text, as the Python side takes them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from scaleout_mp.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable


def plain_number(value: float | str) -> int | float | str:
    """Return a number without a unit as one: seconds, bytes, or a fraction of the machine; all else as it is."""
    if isinstance(value, str):
        for number in (int, float):
            with contextlib.suppress(ValueError):
                return number(value)
    return value


def words(text: str) -> list[str]:
    """Return what stands between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(option: str, text: str) -> list[int]:
    """Return the whole numbers between commas. Raises ConfigError that names the option."""
    try:
        return [int(word) for word in words(text)]
    except ValueError:
        raise ConfigError(f"{option} must be numbers with commas between them, not {text!r}") from None


def assignment(option: str, text: str) -> tuple[str, str]:
    """Return the two sides of NAME=VALUE. Raises ConfigError that names the option."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"{option} {text!r}: say NAME=VALUE")
    return name.strip(), value


def assignments(option: str, texts: Iterable[str]) -> dict[str, str]:
    """Return several of them; the last of a name counts. Raises ConfigError that names the option."""
    return dict(assignment(option, text) for text in texts)
