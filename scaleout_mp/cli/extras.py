"""Parts of the package that are installed on request."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Final

from scaleout_mp.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_LOCALNET: Final = {"aiohttp": "aiohttp>=3.11"}
#: The modules that make up each extra, and the requirement that installs each.
_EXTRAS: Final[Mapping[str, Mapping[str, str]]] = {
    "localnet": _LOCALNET,
    "demo": {**_LOCALNET, "rich": "rich>=13.7", "sklearn": "scikit-learn>=1.5"},
}


def missing_requirements(extra: str) -> list[str]:
    """Return what an extra lacks, as requirements; an empty list: it is there."""
    return [line for module, line in _EXTRAS[extra].items() if importlib.util.find_spec(module) is None]


def require_extra(extra: str) -> None:
    """Raise MissingExtraError, which says what to install, unless an extra is there."""
    missing = missing_requirements(extra)
    if missing:
        raise MissingExtraError(f"scaleout-mp {extra} needs what is not installed: {pip_line(missing)}")


def pip_line(requirements: Sequence[str]) -> str:
    """Return the command that installs them.

    Not by an extra's name: of which index, or which folder, this package came is not known here.
    """
    return " ".join(["pip install", *(f'"{line}"' for line in requirements)])
