"""A callable that is known by name only, and is loaded in the process that runs it."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import itertools
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.errors import TargetError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

    from scaleout_mp.model import ScaleoutModel

#: What people call a parameter that takes all settings at once.
_DICT_NAMES: Final = frozenset({"settings", "client_settings", "parameters", "params", "config"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """`module:function` or `file.py:function`. Where it is made, nothing is imported."""

    #: Name of a module, or absolute path of a file.
    module: str
    is_file: bool
    #: Name in the module, with dots for attributes of attributes.
    function: str
    #: Folder in which modules are looked for first.
    folder: str

    def __call__(self, model: ScaleoutModel | None, settings: Mapping[str, Any]) -> Any:
        """Load and call it.

        Settings that it has parameters for are keyword arguments; else they are one dict behind the model, as the
        callbacks of a client take them. Raises TargetError when there is no such callable, or it does not take them.
        """
        return _call(self._load(), self.function, model, dict(settings))

    def _load(self) -> Callable[..., Any]:
        sys.path.insert(0, self.folder)
        value: Any = self._load_file() if self.is_file else self._load_module()
        place = os.path.basename(self.module)
        for name in self.function.split("."):
            try:
                value = getattr(value, name)
            except AttributeError:
                raise TargetError(f"{place} has no {name}") from None
            place = f"{place}.{name}" if ":" in place else f"{place}:{name}"
        if not callable(value):
            raise TargetError(f"{place} is not callable but of type {type(value).__name__}")
        loaded: Callable[..., Any] = value
        return loaded

    def _load_module(self) -> ModuleType:
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{self.module}.".startswith(f"{error.name}."):
                raise TargetError(f"there is no module {error.name}, from {self.folder} or installed") from None
            raise

    def _load_file(self) -> ModuleType:
        name = os.path.splitext(os.path.basename(self.module))[0]
        spec = importlib.util.spec_from_file_location(name, self.module)
        if spec is None or spec.loader is None:
            raise TargetError(f"{self.module} is no file of Python")
        module = importlib.util.module_from_spec(spec)
        # Pools find the file's functions by this name.
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module


def _call(function: Callable[..., Any], name: str, model: ScaleoutModel | None, settings: dict[str, Any]) -> Any:
    arguments: list[Any] = [] if model is None else [model]
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        # Of C, which does not say: as a callback.
        return function(*arguments, settings) if settings or model is None else function(*arguments)
    if _fits(signature, arguments, settings):
        return function(*arguments, **settings)
    if _fits(signature, [*arguments, settings], {}) and _takes_dict(signature, len(arguments)):
        return function(*arguments, settings)
    given = ["a model"] if model is not None else []
    given += [f"the settings {', '.join(settings)}"] if settings else []
    without = "; it was given no model" if model is None else ""
    raise TargetError(f"{name}{signature} cannot be called with {' and '.join(given) or 'no settings'}{without}")


def _takes_dict(signature: inspect.Signature, position: int) -> bool:
    """Say whether the parameter at a position is one for all settings, as callbacks have it."""
    parameter = next(itertools.islice(signature.parameters.values(), position, None), None)
    if parameter is None or parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        return False
    if parameter.default is not inspect.Parameter.empty:
        return False
    # Behind a model it can be nothing else.
    return position > 0 or parameter.name in _DICT_NAMES or "dict" in f"{parameter.annotation}".lower()


def _fits(signature: inspect.Signature, arguments: list[Any], keywords: dict[str, Any]) -> bool:
    try:
        signature.bind(*arguments, **keywords)
    except TypeError:
        return False
    return True
