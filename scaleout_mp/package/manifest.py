"""`scaleout.yaml`: what a package is started with, and which environment it wants."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Final

from scaleout_mp.errors import PackageError

MANIFEST: Final = "scaleout.yaml"
#: Bytes; a manifest is a few lines.
_MAX_SIZE: Final = 1 << 20
#: Folders below the one that is given in which the manifest is looked for, breadth first.
_MAX_FOLDERS: Final = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a package says of itself."""

    #: The folder that the manifest lies in: the package's own.
    folder: str
    #: File with `startup(client)` in it, below `folder`.
    startup: str
    #: File that describes the package's environment, below `folder`; None: it wants none.
    python_env: str | None = None


def find_package(folder: str) -> str:
    """Return the folder that `scaleout.yaml` lies in: the given one, or the nearest below. Raises PackageError."""
    if not os.path.isdir(folder):
        raise PackageError(f"there is no folder {folder}")
    level, seen = [folder], 0
    while level:
        below = []
        for path in level:
            if os.path.isfile(os.path.join(path, MANIFEST)):
                return os.path.abspath(path)
            seen += 1
            if seen > _MAX_FOLDERS:
                break
            with os.scandir(path) as entries:
                names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
            below += [os.path.join(path, name) for name in names if not name.startswith(".")]
        level = below if seen <= _MAX_FOLDERS else []
    raise PackageError(f"{folder} is no compute package: there is no {MANIFEST} in it")


def read_manifest(folder: str) -> Manifest:
    """Read the manifest of the package in `folder` or below it.

    Raises PackageError, in one line, when there is none, when it is not understood, and when a file that it names is
    not in the package.
    """
    folder = find_package(folder)
    path = os.path.join(folder, MANIFEST)
    content = read_yaml(path)
    points = content.get("entry_points")
    if not isinstance(points, dict) or not points.get("startup"):
        raise PackageError(f"{path} names no startup file: it needs entry_points: {{startup: startup.py}}")
    python_env = content.get("python_env")
    return Manifest(
        folder=folder,
        startup=_inside(folder, points["startup"], f"{path}: entry_points: startup"),
        python_env=None if not python_env else _inside(folder, python_env, f"{path}: python_env"),
    )


def _inside(folder: str, name: Any, what: str) -> str:
    if not isinstance(name, str):
        raise PackageError(f"{what} must be the name of a file, not {name!r}")
    path = os.path.normpath(name)
    if os.path.isabs(path) or path.split(os.sep)[0] == os.pardir:
        raise PackageError(f"{what} must name a file of the package, not {name!r}")
    if not os.path.isfile(os.path.join(folder, path)):
        raise PackageError(f"{what} names {name!r}, which is not in the package")
    return path


def read_yaml(path: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping. Raises PackageError, in one line."""
    import yaml

    try:
        with open(path, "rb") as file:
            raw = file.read(_MAX_SIZE + 1)
        if len(raw) > _MAX_SIZE:
            raise PackageError(f"{path} is larger than {_MAX_SIZE} bytes")
        content = yaml.safe_load(raw)
    except OSError as error:
        raise PackageError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise PackageError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise PackageError(f"{path} must hold a mapping, not {type(content).__name__}")
    return content
