"""An environment in which the demo can run, where what it needs is not installed beside this package."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from typing import TYPE_CHECKING, Final

from scaleout_mp.cli.extras import pip_line
from scaleout_mp.errors import MissingExtraError, PackageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: This package and what it imports: found there where it is found here, and not installed again.
_OURS: Final = (
    "scaleout_mp",
    "click",
    "cloudpickle",
    "cryptography",
    "google.protobuf",
    "grpc",
    "msgpack",
    "numpy",
    "psutil",
    "requests",
    "yaml",
)
#: What the demo imports.
_MODULES: Final = ("scaleout_mp.demo.run", "aiohttp", "rich", "sklearn.datasets")
#: How pip and uv say that they cannot reach an index.
_UNREACHABLE: Final = re.compile(
    "NewConnectionError|ConnectTimeoutError|ReadTimeoutError|ProxyError|dns error|error sending request|"
    "Failed to fetch|Could not connect|Network is unreachable|name resolution|Name or service not known"
)


def demo_python(requirements: Sequence[str], *, on_build: Callable[[], None]) -> str:
    """Return the interpreter of an environment that has this very package and the requirements; made when need be.

    `on_build` is called before that. Raises MissingExtraError, in one line, when it cannot be made.
    """
    from scaleout_mp.package.environment import Environments, PythonEnv

    # Of numpy what is here: it is not needed twice, and another one here is another environment.
    lines = (*requirements, f"numpy=={importlib.metadata.version('numpy')}")
    wanted = PythonEnv(dependencies=lines, needed=(), folders=_folders(_OURS))
    try:
        return Environments().get_program(wanted, modules=_MODULES, on_build=on_build)
    except PackageError as error:
        if _UNREACHABLE.search(str(error)):
            why = "no package index can be reached from here"
        else:
            why = f"no environment can be made for it: {_gist(str(error))}"
        raise MissingExtraError(
            f"the demo needs what is not installed, and {why}; by hand: {pip_line(requirements)}"
        ) from error


def _folders(modules: Sequence[str]) -> tuple[str, ...]:
    """Return the folders in which modules are found, each once, in their order."""
    found: dict[str, None] = {}
    for name in modules:
        spec = importlib.util.find_spec(name)
        if spec is None:
            continue
        places = spec.submodule_search_locations
        path = next(iter(places), None) if places else spec.origin
        if path is not None:
            for _ in name.split("."):
                path = os.path.dirname(path)
            found[os.path.abspath(path)] = None
    return tuple(found)


def _gist(text: str) -> str:
    """Return the line of a program's last words that says most."""
    lines = text.splitlines()
    return next((line for line in lines if line.lower().startswith("error")), lines[-1])
