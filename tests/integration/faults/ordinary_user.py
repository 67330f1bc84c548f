"""A Python, this package and these tests, where a user whom nobody knows can read them.

The checkout and its environment may lie below a folder that only root can enter.
"""

from __future__ import annotations

import importlib.metadata
import os
import pwd
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import psutil
from fault_stage import LEVELS_VARIABLE

CHECKOUT = Path(__file__).resolve().parents[3]
#: Distributions that the faults need, with all that they require.
NEEDED = ("msgpack", "numpy", "cloudpickle", "psutil", "pytest", "pytest-timeout")
#: Parts of the standard library that are large and not needed.
LEFT_OUT = (
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "ensurepip",
    "tkinter",
    "turtledemo",
    "config-*",
)


def unused_uid() -> int:
    """Return the number of a user of whom there is no process and no entry."""
    used = {entry.pw_uid for entry in pwd.getpwall()}
    for process in psutil.process_iter(["uids"]):
        used.update(process.info["uids"] or ())
    generator = random.SystemRandom()
    # Below 65,534: a container may have no others.
    return next(uid for uid in iter(lambda: generator.randrange(20_000, 60_000), 0) if uid not in used)


def open_folder(uid: int) -> Path:
    """Make a folder that the user can reach; the caller removes it. Raises OSError when there is no such place."""
    for parent in dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp")):
        reached = subprocess.run(["test", "-x", parent], user=uid, group=uid, extra_groups=[], check=False)
        if reached.returncode == 0:
            folder = Path(tempfile.mkdtemp(prefix="faults-", dir=parent))
            folder.chmod(0o755)
            return folder
    raise OSError("no temp folder is open to other users")


class Installation:
    """The copy."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.python = folder / "bin" / version
        self._library = folder / "lib" / version
        self.checkout = folder / "checkout"

    def make(self) -> None:
        """Copy everything; takes a second or two."""
        self.python.parent.mkdir()
        _copy_file(Path(os.path.realpath(sys.executable)), self.python)
        _copy_tree(Path(sysconfig.get_path("stdlib", vars={"base": sys.base_prefix})), self._library, *LEFT_OUT)
        library = sysconfig.get_config_var("INSTSONAME") or ""
        if ".so" in library:
            _copy_file(Path(sysconfig.get_config_var("LIBDIR")) / library, self.folder / "lib" / library)
        packages = self._library / "site-packages"
        for name in _with_requirements(NEEDED):
            for file in importlib.metadata.files(name) or ():
                if ".." not in file.parts:
                    _copy_file(Path(str(file.locate())), packages / file)
        self._copy_checkout()

    def _copy_checkout(self) -> None:
        # With what is compiled of it: this user could not keep it, and each process would compile all anew.
        for folder in ("scaleout_mp", "tests/integration/faults"):
            _copy_tree(CHECKOUT / folder, self.checkout / folder)
        for pattern in ("pyproject.toml", "tests/*.py"):
            for file in CHECKOUT.glob(pattern):
                _copy_file(file, self.checkout / file.relative_to(CHECKOUT))

    def environment(self, home: Path) -> dict[str, str]:
        """Return the environment of programs that use the copy."""
        return {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(home),
            "TMPDIR": str(home),
            "LANG": "C.UTF-8",
            "LD_LIBRARY_PATH": str(self.folder / "lib"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": str(self.checkout),
            LEVELS_VARIABLE: os.environ.get(LEVELS_VARIABLE, "auto"),
        }


def _copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)
    target.chmod(0o755 if os.access(source, os.X_OK) else 0o644)


def _copy_tree(source: Path, target: Path, *left_out: str) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*left_out), copy_function=_copy_readable)
    for folder, _, _ in os.walk(target):
        os.chmod(folder, 0o755)


def _copy_readable(source: str, target: str) -> None:
    _copy_file(Path(source), Path(target))


def _with_requirements(names: tuple[str, ...]) -> list[str]:
    """Return the distributions and, as far as they are installed, all that they require without extras."""
    found: list[str] = []
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            # For another platform, or another version of Python.
            continue
        found.append(name)
        plain = (requirement for requirement in requirements if "extra ==" not in requirement)
        waiting += [re.match(r"[\w.-]+", requirement)[0] for requirement in plain]
    return found
