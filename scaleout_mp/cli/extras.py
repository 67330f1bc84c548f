"""Parts of the package that are installed on request."""

from __future__ import annotations

import importlib.util
from typing import Final

from scaleout_mp.errors import MissingExtraError

#: The modules that make up each extra.
_MODULES: Final = {
    "localnet": ("aiohttp",),
    "demo": ("sklearn", "aiohttp", "rich"),
}


def require_extra(extra: str) -> None:
    """Raise MissingExtraError, which says what to install, unless an extra is there."""
    if any(importlib.util.find_spec(module) is None for module in _MODULES[extra]):
        raise MissingExtraError(f'scaleout-mp {extra} needs the extra "{extra}": pip install "scaleout-mp[{extra}]"')
