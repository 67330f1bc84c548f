"""A package that the network gives: downloaded, verified and unpacked; a new one is noticed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from typing import TYPE_CHECKING, Final

from scaleout_mp.errors import ConfigError, PackageError, TransportError
from scaleout_mp.package.archive import checksum_of, remove_unfinished, unpack
from scaleout_mp.package.environment import read_python_env
from scaleout_mp.package.installing import LOOK_EVERY
from scaleout_mp.package.manifest import read_manifest
from scaleout_mp.supervisor.package_callbacks import LoadablePackage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
        self._closed = threading.Event()

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
        self._closed.clear()
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
        path = self._downloaded(archive)
        os.makedirs(self._folders, exist_ok=True)
        with self._alone(self._folders):
            if not os.path.isdir(folder):
                remove_unfinished(self._folders)
                unpack(path, folder)

    def _downloaded(self, archive: RemoteArchive) -> str:
        os.makedirs(self._archives, exist_ok=True)
        path = os.path.join(self._archives, f"{archive.checksum[:16]}-{archive.name}")
        with self._alone(self._archives):
            if not (os.path.isfile(path) and checksum_of(path) == archive.checksum):
                self._download(archive, path)
        return path

    def _download(self, archive: RemoteArchive, path: str) -> None:
        part = f"{path}.part"
        try:
            self._api.download(part, most=_MAX_SIZE)
        except TransportError as error:
            raise PackageError(str(error)) from error
        if checksum_of(part) != archive.checksum:
            os.unlink(part)
            raise PackageError(f"the package {archive.name} that came is not the one of its checksum: not unpacked")
        os.rename(part, path)

    @contextlib.contextmanager
    def _alone(self, folder: str) -> Iterator[None]:
        """Have other clients wait that load into a folder. Raises PackageError when this one is to end."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    # A wait for the lock itself could not be broken off.
                    if self._closed.wait(LOOK_EVERY):
                        raise PackageError("the client ended while its package was loaded by another one") from None
                else:
                    break
            yield
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Break off a wait for another client, and the making of an environment."""
        self._closed.set()
        if self._environments is not None:
            self._environments.close()
