"""A package that the network gives: downloaded, verified and unpacked; a new one is noticed."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from typing import TYPE_CHECKING, Final

from scaleout_mp.errors import ConfigError, PackageError, TransportError
from scaleout_mp.package.archive import checksum_of, unpack
from scaleout_mp.package.environment import read_python_env
from scaleout_mp.package.manifest import read_manifest
from scaleout_mp.supervisor.package_callbacks import LoadablePackage

if TYPE_CHECKING:
    from collections.abc import Callable

    from scaleout_mp.package.environment import Environments
    from scaleout_mp.transport.package_api import PackageApi, RemoteArchive

#: Seconds between two questions for the package that the network has.
ASK_EVERY: Final = 60.0
#: Bytes of an archive.
_MAX_SIZE: Final = 4 * 2**30


class RemotePackage:
    """A `PackageSource` over REST."""

    def __init__(
        self,
        api: PackageApi,
        *,
        archives: str | os.PathLike[str] | None = None,
        folders: str | os.PathLike[str] | None = None,
        environments: Environments | None = None,
        ask_every: float = ASK_EVERY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep archives and what is unpacked of them in these folders; None: where the variables of users say.

        `environments` makes the environment that the package asks for; None: it runs in that of the program.
        """
        environ = os.environ
        self._api = api
        self._archives = os.path.abspath(archives or environ.get("SCALEOUT_ARCHIVE_DIR") or ".scaleout/package_archive")
        self._folders = os.path.abspath(folders or environ.get("SCALEOUT_PACKAGE_EXTRACT_DIR") or "package")
        self._environments = environments
        self._ask_every = ask_every
        self._clock = clock
        self._current: RemoteArchive | None = None
        self._ask_at = 0.0

    @property
    def name(self) -> str:
        """The archive's name."""
        return "of the network" if self._current is None else self._current.name

    def version(self) -> str:
        """Return the checksum of the network's package; while the network does not answer, the last one known."""
        if self._current is None or self._clock() >= self._ask_at:
            try:
                self._current = self._api.current()
            except (TransportError, ConfigError) as error:
                if self._current is None:
                    raise PackageError(str(error)) from error
            self._ask_at = self._clock() + self._ask_every
        return self._current.checksum

    def make_ready(self) -> LoadablePackage:
        """Download and unpack what is not there yet. Raises PackageError and OSError."""
        self.version()
        archive = self._current
        assert archive is not None
        folder = os.path.join(self._folders, archive.checksum[:32])
        if not os.path.isdir(folder):
            self._unpack(archive, folder)
        manifest = read_manifest(folder)
        environment = None
        if self._environments is not None and manifest.python_env is not None:
            wanted = read_python_env(os.path.join(manifest.folder, manifest.python_env))
            environment = self._environments.get(wanted, beside=manifest.folder)
        return LoadablePackage(folder=manifest.folder, startup=manifest.startup, environment=environment)

    def _unpack(self, archive: RemoteArchive, folder: str) -> None:
        """Unpack an archive into the folder of its checksum, unless another client of these folders is faster."""
        path = self._downloaded(archive)
        try:
            unpack(path, folder)
        except PackageError:
            if not os.path.isdir(folder):
                raise

    def _downloaded(self, archive: RemoteArchive) -> str:
        os.makedirs(self._archives, exist_ok=True)
        path = os.path.join(self._archives, f"{archive.checksum[:16]}-{archive.name}")
        if os.path.isfile(path) and checksum_of(path) == archive.checksum:
            return path
        # Under a name of its own: other clients may be loading the same into the same folder.
        descriptor, part = tempfile.mkstemp(dir=self._archives, prefix=f"{archive.checksum[:16]}-", suffix=".part")
        os.close(descriptor)
        try:
            self._api.download(part, most=_MAX_SIZE)
            if checksum_of(part) != archive.checksum:
                raise PackageError(f"the package {archive.name} that came is not the one of its checksum: not unpacked")
            os.rename(part, path)
        except TransportError as error:
            raise PackageError(str(error)) from error
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
        return path

    def close(self) -> None:
        """Break off the making of an environment."""
        if self._environments is not None:
            self._environments.close()
