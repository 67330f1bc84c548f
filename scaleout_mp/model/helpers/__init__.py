"""How a model's weights become bytes and back, and the arithmetic that aggregators use.

A helper of your own is any object with the methods of `Helper`; `register_helper` makes it known by its
name to this process. A model remembers the name, so every process that reads the model must have registered
it.
"""

from __future__ import annotations

from scaleout_mp.model.helpers.android import AndroidHelper
from scaleout_mp.model.helpers.base import Helper, Source, Target
from scaleout_mp.model.helpers.binary import BinaryHelper
from scaleout_mp.model.helpers.numeric import NumpyHelper

_helpers: dict[str, Helper] = {}


def register_helper(helper: Helper) -> None:
    """Make a helper known under its name; a later one with the same name takes its place."""
    if isinstance(helper, type):
        raise TypeError(f"a helper is an object: register {helper.__name__}(), not the class")
    if not isinstance(helper, Helper):
        raise TypeError("a helper needs a name and the methods save and load")
    name: object = helper.name
    if not isinstance(name, str):
        raise TypeError(f"a helper's name must be a string, not {type(name).__name__}")
    if not name:
        raise ValueError("a helper's name must not be empty")
    _helpers[name] = helper


def get_helper(name: str) -> Helper:
    """Return the helper of that name; ValueError when none is registered."""
    helper = _helpers.get(name)
    if helper is None:
        raise ValueError(f"no helper is named {name!r}; known: {', '.join(sorted(_helpers))}. See register_helper.")
    return helper


def require_helper(helper: Helper, *methods: str) -> None:
    """Raise TypeError when something has not these methods of a helper; a name is none, for one."""
    if not all(callable(getattr(helper, method, None)) for method in methods):
        known = f": get_helper({helper!r}) gives the one of that name" if isinstance(helper, str) else ""
        raise TypeError(f"{helper!r} is no helper, which has the methods save and load{known}")


for _helper in (NumpyHelper(), BinaryHelper(), AndroidHelper()):
    register_helper(_helper)

__all__ = [
    "AndroidHelper",
    "BinaryHelper",
    "Helper",
    "NumpyHelper",
    "Source",
    "Target",
    "get_helper",
    "register_helper",
    "require_helper",
]
