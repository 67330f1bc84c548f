"""Models on disk, one file for each, in a folder that several processes share.

Two locks, both of flock(2), so that none outlives its owner: `.lock` is held for the moment in which files are
renamed or removed; a shared lock on a model's file says that somebody uses it or is writing it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import os
import re
import time
import uuid
from typing import TYPE_CHECKING, Final

from scaleout_mp.errors import ModelError, ModelNotFoundError
from scaleout_mp.model.container import DEFAULT_LIMITS, ContainerLimits
from scaleout_mp.model.files import sync_folder
from scaleout_mp.model.memfd import MappedBytes, write_all
from scaleout_mp.model.scaleout_model import ScaleoutModel

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

#: Bytes of all models together, unless the caller says otherwise.
DEFAULT_MAX_BYTES: Final = 64 << 30

_SUFFIX: Final = ".scm"
_PART: Final = ".part"
_LOCK: Final = ".lock"
# Becomes a file name: no separators, no leading dot, room for what else the name bears within 255 bytes.
_PLAIN_ID: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stored:
    path: str
    size: int
    #: Of the last use.
    used_ns: int


class ModelStore:
    """A folder of `<model_id>.scm` files, each there whole or not at all.

    When the models together pass `max_bytes`, those that were not used for longest are removed, except those in use: a
    model from `get` is in use until it is closed, here and in every process that has its descriptor.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
        limits: ContainerLimits = DEFAULT_LIMITS,
    ) -> None:
        """Use a folder, which is made when it is missing. `limits`: for what is read from it."""
        if max_bytes < 1:
            raise ValueError("max_bytes must be positive")
        self.folder = os.path.abspath(folder)
        self.max_bytes = max_bytes
        self._limits = limits
        # Files whose contents were compared with their checksums, or written, by this object: inode, size, time.
        self._verified: dict[str, tuple[int, int, int]] = {}
        os.makedirs(self.folder, exist_ok=True)

    def put(self, model: ScaleoutModel) -> str:
        """Write a model to disk under its id, durably, and return the file's path.

        Then others are removed, as far as needed. ModelError when the model alone is larger than the store may be.
        """
        if model.model_id is None:
            raise ModelError("a model without an id cannot be stored")
        path = self.path(model.model_id)
        if model.size > self.max_bytes:
            raise ModelError(
                f"model {model.model_id} has {model.size:,} bytes; the store holds {self.max_bytes:,} at most"
            )
        with self._part(model.model_id) as (part, fd):
            for chunk in model.iter_chunks(model.size):
                write_all(fd, chunk)
            # The kernel's own times are those of the last tick, which may lie before a use that was earlier than this.
            os.utime(fd, ns=(time.time_ns(), time.time_ns()))
            os.fsync(fd)
            with self._changing():
                os.rename(part, path)
                self._verified[model.model_id] = _identity(os.fstat(fd))
                # Still locked, so this is not the one that has to go.
                self._evict()
            sync_folder(self.folder)
        return path

    def get(self, model_id: str, *, verify: bool = True) -> ScaleoutModel:
        """Return a model mapped from disk; it is not evicted until it is closed.

        Bare weights, which have no id of their own, get the one that they are asked for by.

        ModelNotFoundError when it is not here. `verify`: compare all of it with its checksums, once for each file;
        ModelFormatError when it is damaged. Without it, each part is compared when it is first used here.
        """
        path = self.path(model_id)
        try:
            fd = _open_in_use(path)
        except FileNotFoundError as error:
            raise ModelNotFoundError(f"model {model_id} is not in {self.folder}") from error
        status = os.fstat(fd)
        model = ScaleoutModel.from_memory(MappedBytes(fd, status.st_size), limits=self._limits)
        try:
            if model.legacy_source:
                model = model.to_builder().set_model_id(model_id).build()
            # Another user's file, or a disk that is read-only: only the order of eviction is less exact.
            with contextlib.suppress(OSError):
                os.utime(fd, ns=(time.time_ns(), status.st_mtime_ns))
            if verify and self._verified.get(model_id) != _identity(status):
                model.verify()
                self._verified[model_id] = _identity(status)
        except BaseException:
            model.close()
            raise
        return model

    def delete(self, model_id: str) -> None:
        """Remove a model, if it is here, also when it is in use: whoever has it open can go on reading it."""
        path = self.path(model_id)
        with self._changing(), contextlib.suppress(FileNotFoundError):
            os.unlink(path)
            sync_folder(self.folder)
        self._verified.pop(model_id, None)

    def list(self) -> tuple[str, ...]:
        """Return the ids of all models here, sorted."""
        names = (name.removesuffix(_SUFFIX) for name in os.listdir(self.folder) if name.endswith(_SUFFIX))
        return tuple(sorted(name for name in names if _PLAIN_ID.fullmatch(name)))

    def path(self, model_id: str) -> str:
        """Return where a model of that id lies, or would lie; ValueError unless the id is a plain name."""
        if not _PLAIN_ID.fullmatch(model_id):
            raise ValueError(f"{model_id!r} cannot be a model's file name: letters, digits, '.', '_' and '-' only")
        return os.path.join(self.folder, model_id + _SUFFIX)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Be the only one, of all processes, who renames and removes files here."""
        fd = os.open(os.path.join(self.folder, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _part(self, model_id: str) -> Iterator[tuple[str, int]]:
        """Give a new file, locked as long as it is written; it is removed unless it was renamed."""
        with self._changing():
            # Nobody sweeps between the making and the locking.
            path = os.path.join(self.folder, f".{model_id[:100]}.{uuid.uuid4().hex}{_PART}")
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            fcntl.flock(fd, fcntl.LOCK_SH)
        try:
            yield path, fd
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            os.close(fd)

    def _evict(self) -> None:
        """Remove what dead writers left, and the models used longest ago, until the rest is small enough."""
        stored = sorted(self._files(_SUFFIX), key=lambda file: file.used_ns)
        excess = sum(file.size for file in stored) - self.max_bytes
        for file in self._files(_PART):
            _remove_unless_locked(file.path)
        for file in stored:
            if excess <= 0:
                return
            if _remove_unless_locked(file.path):
                excess -= file.size
                model_id = os.path.basename(file.path).removesuffix(_SUFFIX)
                self._verified.pop(model_id, None)
                logger.info(
                    "removed model %s from the store: it was not used for longest",
                    model_id,
                    extra={"action": "model_evicted", "model_id": model_id, "bytes": file.size},
                )
        if excess > 0:
            logger.warning(
                "the model store is %d bytes over its %d: the models in it are all in use",
                excess,
                self.max_bytes,
                extra={"action": "store_full"},
            )

    def _files(self, suffix: str) -> Iterator[_Stored]:
        with os.scandir(self.folder) as found:
            for file in found:
                with contextlib.suppress(FileNotFoundError):
                    if file.name.endswith(suffix) and file.is_file(follow_symlinks=False):
                        status = file.stat(follow_symlinks=False)
                        yield _Stored(path=file.path, size=status.st_size, used_ns=status.st_atime_ns)


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _open_in_use(path: str) -> int:
    """Open a model's file with a shared lock on it, so that it stays. The lock goes with the last descriptor."""
    while True:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            # Exclusively locked, it is about to go; it can be read all the same.
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink:
                return fd
        except BaseException:
            os.close(fd)
            raise
        # Removed or replaced between the opening and the locking.
        os.close(fd)


def _remove_unless_locked(path: str) -> bool:
    """Remove a file that nobody uses or writes; say whether it is gone. The caller holds the folder's lock."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True
