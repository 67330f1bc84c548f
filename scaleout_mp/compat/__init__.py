"""The names under which users of the published packages import what is here.

`install` adds an import hook that has the last word: where `scaleout` or `scaleoututil` is installed, that is what is
imported. Where it is not, the names that training code uses lead to ours.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import ModuleType

#: What is imported from where: {module: {name: where ours is}}. By name, since they stand above this layer.
_NAMES: Final[Mapping[str, Mapping[str, str]]] = {
    "scaleout": {
        "EdgeClient": "scaleout_mp.client",
        "ScaleoutModel": "scaleout_mp.model",
    },
    "scaleout.client": {},
    "scaleout.client.edge_client": {
        "ConnectToApiResult": "scaleout_mp.client",
        "EdgeClient": "scaleout_mp.client",
        "EdgeClientRuntime": "scaleout_mp.client",
        "GrpcConnectionOptions": "scaleout_mp.client",
        "LoggingContext": "scaleout_mp.client",
        "ScaleoutModel": "scaleout_mp.model",
    },
    "scaleout.client.grpc_handler": {"GrpcConnectionOptions": "scaleout_mp.client"},
    "scaleout.client.inference_context": {"InferenceContext": "scaleout_mp.client"},
    "scaleout.client.logging_context": {"LoggingContext": "scaleout_mp.client"},
    "scaleout.client.task_receiver": {"StoppedException": "scaleout_mp.errors"},
    "scaleoututil": {"ScaleoutLogger": "scaleout_mp.compat.parts"},
    "scaleoututil.helpers": {},
    "scaleoututil.helpers.helperbase": {"HelperBase": "scaleout_mp.compat.parts"},
    "scaleoututil.helpers.helpers": {
        "get_helper": "scaleout_mp.model",
        "load_metadata": "scaleout_mp.compat.parts",
        "save_metadata": "scaleout_mp.compat.parts",
        "save_metrics": "scaleout_mp.compat.parts",
    },
    "scaleoututil.helpers.plugins": {},
    "scaleoututil.helpers.plugins.androidhelper": {"Helper": "scaleout_mp.model.helpers:AndroidHelper"},
    "scaleoututil.helpers.plugins.binaryhelper": {"Helper": "scaleout_mp.model.helpers:BinaryHelper"},
    "scaleoututil.helpers.plugins.numpyhelper": {"Helper": "scaleout_mp.model.helpers:NumpyHelper"},
    "scaleoututil.logging": {"ScaleoutLogger": "scaleout_mp.compat.parts"},
    "scaleoututil.utils": {},
    "scaleoututil.utils.checksum": {"sha": "scaleout_mp.compat.parts"},
    "scaleoututil.utils.model": {
        "IncompatibleModelFormatError": "scaleout_mp.errors",
        "ScaleoutModel": "scaleout_mp.model",
        "ScaleoutModelBuilder": "scaleout_mp.model",
    },
}
#: Tells a module of ours from one that is installed.
MARK: Final = "__scaleout_mp__"


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what nobody before it has found."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return how to make a module of ours; None for what is not ours to answer."""
        del path, target
        parent = fullname.rpartition(".")[0]
        if fullname not in _NAMES or (parent and not is_ours(sys.modules.get(parent))):
            return None
        is_package = any(name.startswith(f"{fullname}.") for name in _NAMES)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=is_package)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Leave the making of the module to the import system."""
        del spec

    def exec_module(self, module: ModuleType) -> None:
        """Have the names lead to ours when they are first used."""
        names = _NAMES[module.__name__]

        def find(name: str) -> Any:
            where = names.get(name)
            if where is None:
                raise AttributeError(
                    f"scaleout_mp has no {name} for {module.__name__}; install the package that has it"
                )
            home, _, attribute = where.partition(":")
            value = getattr(importlib.import_module(home), attribute or name)
            setattr(module, name, value)
            return value

        setattr(module, MARK, True)
        module.__dict__["__getattr__"] = find
        module.__dict__["__all__"] = list(names)


_finder: Final = _Finder()


def install() -> None:
    """Add the import hook to this process. Further calls change nothing."""
    if _finder not in sys.meta_path:
        sys.meta_path.append(_finder)


def is_ours(module: ModuleType | None) -> bool:
    """Whether a module that is imported is one that this hook made."""
    return bool(module is not None and getattr(module, MARK, False))


def published(name: str) -> ModuleType | None:
    """Return a module of the published packages when it is loaded here, and is theirs."""
    module = sys.modules.get(name)
    return None if is_ours(module) else module
