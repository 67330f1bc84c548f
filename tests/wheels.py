"""Wheels of what is installed here, so that environments can be made without a network."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import zipfile
from pathlib import Path


def repack(name: str, folder: Path) -> Path:
    """Write the wheel of an installed distribution, as its RECORD lists it."""
    distribution = importlib.metadata.distribution(name)
    tag = next(line for line in distribution.read_text("WHEEL").splitlines() if line.startswith("Tag: "))[5:]
    path = folder / f"{name}-{distribution.version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file in distribution.files:
            where = Path(distribution.locate_file(file))
            if not str(file).startswith("..") and "__pycache__" not in str(file) and where.exists():
                wheel.write(where, str(file))
    return path


def make(name: str, version: str, source: str, folder: Path) -> Path:
    """Write the wheel of a module of one file."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
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
