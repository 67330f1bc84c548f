"""A package in a folder of this machine, which somebody may edit at any time."""

from __future__ import annotations

import hashlib
import logging
import os
from typing import TYPE_CHECKING, Final

from scaleout_mp.package.environment import read_python_env
from scaleout_mp.package.manifest import MANIFEST, find_package, read_manifest
from scaleout_mp.supervisor.package_callbacks import LoadablePackage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scaleout_mp.package.environment import Environments

logger = logging.getLogger(__name__)

#: Endings of files that make up a package's code. Data may come and go: tasks themselves put them there.
_CODE: Final = (".py", ".so", ".pth")
#: Entries of folders that are looked at; a package that keeps its data beside its code may have any number.
_MAX_ENTRIES: Final = 20_000


class LocalPackage:
    """A `PackageSource` that reads a folder where it lies."""

    def __init__(self, folder: str | os.PathLike[str], *, environments: Environments | None = None) -> None:
        """`folder` has `scaleout.yaml` in it, or in a folder below. Raises PackageError when it has not.

        `environments` makes the environment that the package asks for; None: it runs in that of the program.
        """
        self._given = os.path.abspath(folder)
        self._environments = environments
        self._said_large = False
        read_manifest(self._given)

    @property
    def name(self) -> str:
        """The folder."""
        return self._given

    def version(self) -> str:
        """Return a digest of names, sizes and times of the package's code. Raises PackageError and OSError."""
        folder = find_package(self._given)
        digest = hashlib.blake2b(folder.encode(errors="surrogateescape"), digest_size=16)
        for path, facts in sorted(self._code_files(folder)):
            digest.update(f"\0{path}\0{facts.st_size}\0{facts.st_mtime_ns}\0{facts.st_ino}".encode(errors="replace"))
        return digest.hexdigest()

    def _code_files(self, folder: str) -> Iterator[tuple[str, os.stat_result]]:
        folders, entries = [folder], 0
        for path in folders:
            try:
                found = list(os.scandir(path))
            except OSError:
                # Gone since its parent was read; or nobody's to read, then nothing is imported from it either.
                continue
            entries += len(found)
            if entries > _MAX_ENTRIES:
                self._say_large(folder)
                return
            for entry in found:
                if entry.name.startswith(".") or entry.name == "__pycache__":
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.name.endswith(_CODE) or self._is_description(folder, path, entry.name):
                    try:
                        yield entry.path, entry.stat()
                    except OSError:
                        continue

    @staticmethod
    def _is_description(folder: str, path: str, name: str) -> bool:
        # The manifest, and what it may name.
        return path == folder and (name == MANIFEST or name.endswith((".yaml", ".yml")))

    def _say_large(self, folder: str) -> None:
        if not self._said_large:
            self._said_large = True
            logger.warning(
                "%s holds more than %d files: changes are seen in the folders nearest to %s alone",
                folder,
                _MAX_ENTRIES,
                MANIFEST,
                extra={"action": "package_large"},
            )

    def make_ready(self) -> LoadablePackage:
        """Read the manifest and, where one is wanted, make the environment. Raises PackageError and OSError."""
        manifest = read_manifest(self._given)
        environment = None
        if self._environments is not None and manifest.python_env is not None:
            wanted = read_python_env(os.path.join(manifest.folder, manifest.python_env))
            environment = self._environments.get(wanted, beside=manifest.folder)
        return LoadablePackage(folder=manifest.folder, startup=manifest.startup, environment=environment)

    def close(self) -> None:
        """Break off the making of an environment."""
        if self._environments is not None:
            self._environments.close()
