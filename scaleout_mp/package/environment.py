"""The environment that a package asks for in `python_env.yaml`: built once for each content, verified, kept.

The program stays in its own. Of this package the environment gets the child side, as a copy beside it, and what that
needs: numpy and msgpack.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import sys
import sysconfig
import time
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.errors import PackageError
from scaleout_mp.executor import Environment
from scaleout_mp.package.copies import PackageCopies
from scaleout_mp.package.installing import LOOK_EVERY, Installer, find_installer
from scaleout_mp.package.locks import lock
from scaleout_mp.package.manifest import read_yaml
from scaleout_mp.package.uses import EnvironmentUses, lock_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

logger = logging.getLogger(__name__)

#: What the child side of this package imports.
NEEDED: Final = ("msgpack>=1.1", "numpy")
#: The modules of the child side that have to work in an environment.
_CHILD_SIDE: Final = (
    "numpy",
    "scaleout_mp.worker.__main__",
    "scaleout_mp.worker.template",
    "scaleout_mp.client.package_calls",
    "scaleout_mp.model",
)
#: The published client's own names: it is not what runs here.
_NOT_NEEDED: Final = frozenset({"fedn", "scaleout"})
_MARK: Final = "scaleout-mp-environment.json"
#: Options of a requirements file that are followed by a path.
_OPTION: Final = re.compile(r"^(-r|--requirement|-c|--constraint|-e|--editable)[\s=]*")
_FILE: Final = re.compile(r"\.(whl|zip|tar\.gz|tgz)$")
#: Folders that building a distribution leaves beside its source, or that hold no source.
_MADE: Final = re.compile(r"^(\..*|__pycache__|build|.*\.egg-info)$")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PythonEnv:
    """What is wanted of an environment: what `python_env.yaml` says."""

    build_dependencies: tuple[str, ...] = ()
    dependencies: tuple[str, ...] = ()
    #: What the program that runs in it imports beside.
    needed: tuple[str, ...] = NEEDED
    #: Folders whose modules it has as well, after its own.
    folders: tuple[str, ...] = ()

    @property
    def requirements(self) -> tuple[str, ...]:
        """What is installed in it."""
        named = {_distribution(line) for line in self.dependencies}
        return (*self.dependencies, *(line for line in self.needed if _distribution(line) not in named))

    def key(self, beside: str) -> str:
        """Return what is the same for environments that are the same; paths are looked for from `beside`."""
        local = [_local_path(line, beside) for line in (*self.build_dependencies, *self.dependencies)]
        content = [
            [[path, _digest_of(path)] for path in local if path is not None],
            self.build_dependencies,
            self.requirements,
            self.folders,
            platform.python_implementation(),
            sys.version_info[:3],
            os.path.realpath(sys.executable),
            platform.machine(),
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def _distribution(line: str) -> str:
    """Return the name that a requirement begins with, as indexes compare names."""
    match = _NAME.match(line.strip())
    return "" if match is None else re.sub(r"[-_.]+", "-", match[0]).lower()


def _local_path(line: str, beside: str) -> str | None:
    """Return the file or folder that a line of requirements names; None when it names a distribution."""
    text = _OPTION.sub("", line.strip()).partition(" @ ")[2] or _OPTION.sub("", line.strip())
    text = text.removeprefix("file://").removeprefix("file:").partition(" ;")[0].partition(" #")[0].strip()
    if os.sep not in text and not (text.startswith(".") or _FILE.search(text) or text != line.strip()):
        # `numpy` is a distribution, whatever lies beside the package.
        return None
    path = os.path.normpath(os.path.join(beside, re.sub(r"\[[^]]*\]$", "", text)))
    return path if os.path.exists(path) else None


def _digest_of(path: str) -> str:
    """Return a digest of a file, or of what in a folder is not made by installing it. Raises OSError."""
    digest = hashlib.sha256()
    if os.path.isfile(path):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not _MADE.search(name))
        for name in sorted(names):
            inside = os.path.join(folder, name)
            if os.path.isfile(inside):
                digest.update(f"\0{os.path.relpath(inside, path)}\0{_digest_of(inside)}".encode(errors="replace"))
    return digest.hexdigest()


def read_python_env(path: str) -> PythonEnv:
    """Read `python_env.yaml`. Raises PackageError, in one line."""
    content = read_yaml(path)
    return PythonEnv(
        build_dependencies=_requirements(content, "build_dependencies", path),
        dependencies=_requirements(content, "dependencies", path),
    )


def _requirements(content: dict[str, Any], key: str, path: str) -> tuple[str, ...]:
    lines = content.get(key) or []
    if not isinstance(lines, list) or not all(isinstance(line, str) and "\n" not in line for line in lines):
        raise PackageError(f"{path}: {key} must be a list of requirements, each a line of text")
    return tuple(line.strip() for line in lines if line.strip() not in _NOT_NEEDED)


def default_cache() -> str:
    """Return where environments are kept unless somebody says otherwise."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "scaleout-mp")


class Environments:
    """Environments in a folder that all clients of a user share. Its methods block.

    Those that it has given are in use as long as it lives; those that nobody has used for 30 days are removed.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._folder = os.path.abspath(default_cache() if folder is None else folder)
        self._environments = os.path.join(self._folder, "environments")
        self._copies = PackageCopies(os.path.join(self._folder, "package"))
        self._uses = EnvironmentUses(self._environments)
        self._closed = False

    def get(self, wanted: PythonEnv, *, beside: str) -> Environment:
        """Return an environment for tasks that holds what is wanted; build it when there is none, or when it is broken.

        Requirements that are paths are looked for from the folder `beside`. Raises PackageError with the end of what
        the installer said, and OSError.
        """
        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        root = self._copies.current()
        executable = self._python(wanted, _imports(_CHILD_SIDE), beside=beside, root=root)
        return Environment(executable=executable, package_root=root)

    def get_program(self, wanted: PythonEnv, *, modules: Sequence[str], on_build: Callable[[], None]) -> str:
        """Return the interpreter of an environment in which these modules can be imported; else like `get`.

        `on_build` is called before one is built. It counts as used now, for who replaces this program by that one.
        """
        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        # A person waits: that they were imported once is enough, as long as they are there.
        packages = tuple(dict.fromkeys(name.partition(".")[0] for name in modules))
        there = f"import importlib.util as u; assert all(map(u.find_spec, {packages!r}))"
        return self._python(wanted, _imports(modules), beside=self._folder, again=there, on_build=on_build)

    def _python(
        self,
        wanted: PythonEnv,
        check: str,
        *,
        beside: str,
        root: str | None = None,
        again: str | None = None,
        on_build: Callable[[], None] | None = None,
    ) -> str:
        """Return an interpreter that runs `check`, and each later time `again`, without an error."""
        self._closed = False
        key = wanted.key(beside)
        path = os.path.join(self._environments, key)
        os.makedirs(self._environments, exist_ok=True)
        executable = os.path.join(path, "bin", "python")
        with self._locked(lock_file(path)) as descriptor:
            if not _is_marked(path, key, wanted) or self._problem(executable, again or check, root) is not None:
                if on_build is not None:
                    on_build()
                try:
                    self._build(path, wanted, beside, descriptor)
                    self._require_working(executable, check, root)
                except BaseException:
                    # Half of one may be large, and is of no use.
                    shutil.rmtree(path, ignore_errors=True)
                    raise
                _mark(path, key, wanted)
            self._uses.hold(path)
        self._uses.prune()
        return executable

    def close(self) -> None:
        """Break off a build. Called from another thread."""
        self._closed = True

    def _require_wanted(self) -> None:
        if self._closed:
            raise PackageError("the client ended while the package's environment was made")

    @contextlib.contextmanager
    def _locked(self, path: str) -> Iterator[int]:
        """Have the others wait that want to build the same, while the descriptor or a copy of it is open."""
        while True:
            self._require_wanted()
            try:
                descriptor = lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # A wait for the lock itself could not be broken off.
                time.sleep(LOOK_EVERY)
            else:
                break
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _build(self, path: str, wanted: PythonEnv, beside: str, lock: int) -> None:
        shutil.rmtree(path, ignore_errors=True)
        installer = find_installer(path, beside, self._require_wanted, lock=lock)
        logger.info(
            "building the package's environment with %s: %s",
            installer.name,
            ", ".join(wanted.requirements),
            extra={"action": "environment_building"},
        )
        begun = time.monotonic()
        installer.make()
        if wanted.folders:
            _add_folders(path, wanted.folders)
        for requirements in filter(None, [wanted.build_dependencies, wanted.requirements]):
            installer.install(requirements)
        logger.info(
            "the package's environment was built in %.1f s",
            time.monotonic() - begun,
            extra={"action": "environment_built"},
        )

    def _require_working(self, executable: str, check: str, root: str | None) -> None:
        problem = self._problem(executable, check, root)
        if problem is not None:
            raise PackageError(f"the environment that was built cannot be used: {problem}")

    def _problem(self, executable: str, check: str, root: str | None) -> str | None:
        """Say what keeps an environment from being used: `check` is run in it, beside the copy in `root`."""
        if not os.path.exists(executable):
            return "it has no interpreter"
        program = Installer(self._folder, self._folder, self._require_wanted)
        try:
            program.run([executable, "-P", "-c", check], {} if root is None else {"PYTHONPATH": root})
        except PackageError as error:
            return str(error)
        return None


def _add_folders(path: str, folders: Sequence[str]) -> None:
    """Have an environment's interpreter find the modules in other folders, once it has not found its own."""
    own = sysconfig.get_path("purelib", scheme="venv", vars={"base": path, "platbase": path})
    with open(os.path.join(own, "scaleout-mp-folders.pth"), "wb") as file:
        file.writelines(os.fsencode(folder) + b"\n" for folder in folders)


def _imports(modules: Sequence[str]) -> str:
    return f"import {', '.join(modules)}"


def _mark_text(key: str, wanted: PythonEnv) -> str:
    return json.dumps({"key": key, "requirements": wanted.requirements})


def _is_marked(path: str, key: str, wanted: PythonEnv) -> bool:
    """Whether the environment was built to its end, and for this."""
    try:
        with open(os.path.join(path, _MARK), encoding="utf-8") as file:
            return file.read() == _mark_text(key, wanted)
    except OSError:
        return False


def _mark(path: str, key: str, wanted: PythonEnv) -> None:
    mark = os.path.join(path, _MARK)
    with open(f"{mark}.new", "w", encoding="utf-8") as file:
        file.write(_mark_text(key, wanted))
        file.flush()
        os.fsync(file.fileno())
    os.rename(f"{mark}.new", mark)
