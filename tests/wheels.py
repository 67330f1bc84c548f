"""Wheels of what is installed here, so that environments can be made without a network."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import tomllib
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def repack(name: str, folder: Path) -> Path:
    """Write the wheel of an installed distribution, as its RECORD lists it."""
    distribution = importlib.metadata.distribution(name)
    tag = next(line for line in distribution.read_text("WHEEL").splitlines() if line.startswith("Tag: "))[5:]
    # A hyphen would end the name.
    path = folder / f"{name.replace('-', '_')}-{distribution.version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file in distribution.files:
            where = Path(distribution.locate_file(file))
            if not str(file).startswith("..") and "__pycache__" not in str(file) and where.exists():
                wheel.write(where, str(file))
    return path


def needed_by(*lines: str) -> set[str]:
    """Return the names of the installed distributions that requirements lead to, extras left out."""
    found: set[str] = set()
    left = list(lines)
    while left:
        requirement = Requirement(left.pop())
        name = canonicalize_name(requirement.name)
        if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found.add(name)
            left += importlib.metadata.requires(name) or []
    return found


def make(name: str, version: str, source: str, folder: Path) -> Path:
    """Write the wheel of a module of one file."""
    return _write(name, version, {f"{name}.py": source}, folder)


def make_ours(project: Path, folder: Path) -> Path:
    """Write the wheel of this package, as `pip install .` makes it, without what that downloads to make it."""
    described = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    source = project / "scaleout_mp"
    files = {
        str(path.relative_to(project)): path.read_text(encoding="utf-8")
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    entry_points = "".join(f"{name} = {where}\n" for name, where in described["scripts"].items())
    return _write(
        "scaleout_mp",
        described["version"],
        files,
        folder,
        requires=described["dependencies"],
        entry_points=f"[console_scripts]\n{entry_points}",
    )


def _write(name, version, files, folder, *, requires=(), entry_points=""):
    info = f"{name}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {line}\n" for line in requires)
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": entry_points,
    }
    lines = []
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(text.encode())}")
    files[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,"]) + "\n"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for inside, text in files.items():
            wheel.writestr(inside, text)
    return path
