"""The folder in which a client keeps what must outlive it: the journal, and results on their way to the server."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import logging
import os
import re
import weakref
from typing import TYPE_CHECKING, Final

from scaleout_mp.config import state_folder
from scaleout_mp.errors import StateError, StateInUseError
from scaleout_mp.model.files import replace_file
from scaleout_mp.supervisor.file_lock import FileLock, FileLockedError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from scaleout_mp.model import ScaleoutModel

logger = logging.getLogger(__name__)

#: Where a setting says this, nothing is kept on the disk.
IN_MEMORY: Final = ":memory:"

_SUFFIX: Final = ".scm"
_CHUNK: Final = 16 << 20


class StateFolder:
    """One client's folder, locked as long as it is open: two clients with one id would take each other's messages."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.journal_path = os.path.join(path, "journal.db")
        self._results = os.path.join(path, "results")
        #: What each result is of. The journal says it as well, unless it is damaged.
        self._notes = os.path.join(path, "notes")
        self._lock: FileLock | None = None

    @classmethod
    def of(cls, client_id: str, network: str, *, root: str | None) -> StateFolder:
        """Return the folder of a client in a network.

        What waits for one server must never reach another; so the network, as its address, is part of the name.
        """
        return cls(os.path.join(_base(root), _folder_name(client_id, network)))

    def open(self) -> None:
        """Make the folder, for this user alone, and lock it.

        Raises StateInUseError when another client has it, StateError when it cannot be made or written.
        """
        try:
            # One by one: a mode is for the last folder of a path alone.
            for folder in (self.path, self._results, self._notes):
                os.makedirs(folder, mode=0o700, exist_ok=True)
            if os.stat(self.path).st_mode & 0o077:
                os.chmod(self.path, 0o700)
            self._lock = FileLock(os.path.join(self.path, "lock"))
            self._lock.write(str(os.getpid()))
        except FileLockedError as owner:
            raise StateInUseError(
                f"another client with this id runs on this machine (process {owner}) and uses {self.path}; "
                "end it, or give this one an id of its own"
            ) from None
        except OSError as error:
            self.close()
            raise StateError(f"{self.path} cannot be used: {error.strerror or error}{self._whose()}") from error

    def _whose(self) -> str:
        """Return whose the folder is, where it is somebody else's."""
        with contextlib.suppress(OSError):
            owner = os.stat(self.path).st_uid
            if owner != os.geteuid():
                return f"; it belongs to user {owner}: run the client as that user, or with another state folder"
        return ""

    def close(self) -> None:
        """Unlock the folder. Safe to call again."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    # Results on their way

    def keep_result(self, model: ScaleoutModel, update_id: str, note: bytes) -> None:
        """Write a model, and what it is of, to disk, safe from a loss of power. Raises OSError. Call it on a thread."""
        replace_file(self._result_path(update_id), *model.iter_chunks(_CHUNK), sync=True)
        # Last: it stands for a model that is whole.
        replace_file(os.path.join(self._notes, update_id), note, sync=True)

    def notes(self) -> list[bytes]:
        """Return what the models that are kept are of."""
        found = []
        for name in sorted(os.listdir(self._notes)):
            with contextlib.suppress(OSError), open(os.path.join(self._notes, name), "rb") as file:
                found.append(file.read())
        return found

    def open_result(self, update_id: str) -> ScaleoutModel:
        """Return a model that was kept. Raises FileNotFoundError, and ModelFormatError when it is damaged."""
        from scaleout_mp.model import ScaleoutModel

        model = ScaleoutModel.from_file(self._result_path(update_id))
        try:
            model.verify()
        except BaseException:
            model.close()
            raise
        return model

    def forget_result(self, update_id: str) -> None:
        """Remove a model that the server has, or that nobody wants any more."""
        for path in (os.path.join(self._notes, update_id), self._result_path(update_id)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def sweep(self, wanted: Collection[str]) -> None:
        """Remove what a killed client left: all results but those wanted."""
        for folder, suffix in ((self._notes, ""), (self._results, _SUFFIX)):
            kept = {update_id + suffix for update_id in wanted}
            for name in os.listdir(folder):
                if name not in kept:
                    os.unlink(os.path.join(folder, name))
                    logger.debug("removed the left-over %s", name, extra={"action": "result_swept"})

    def _result_path(self, update_id: str) -> str:
        return os.path.join(self._results, update_id + _SUFFIX)


def _base(root: str | None) -> str:
    return os.path.abspath(root or os.path.join(state_folder(), "clients"))


def _folder_name(name: str, network: str) -> str:
    digest = hashlib.sha256(f"{network}\n{name}".encode()).hexdigest()[:12]
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:80].lstrip(".") or "client"
    return f"{readable}-{digest}"


class KeptId:
    """The id of a client that was given none: the next start takes the same, and so what waits for the server.

    Several such clients of one name run beside each other, each with an id of its own.
    """

    def __init__(self, lock: FileLock, slot: str) -> None:
        self._lock = lock
        self._slot = slot
        # With the client that has it.
        weakref.finalize(self, lock.release)

    @classmethod
    def take(cls, name: str, network: str, *, root: str | None) -> KeptId:
        """Take the first id that no living client has, for as long as this object lives. Raises OSError."""
        base = _base(root)
        folder = os.path.join(base, "ids", _folder_name(name, network))
        os.makedirs(folder, mode=0o700, exist_ok=True)
        collected = False
        for number in itertools.count():
            path, slot = os.path.join(folder, str(number)), os.path.join(base, str(number))
            try:
                return cls(FileLock(path), slot)
            except FileLockedError as error:
                if collected or not error.here:
                    continue
            # Of a client of this process, which may be one that a notebook has replaced: client and runtime know each
            # other, so its end is that of garbage.
            gc.collect()
            collected = True
            with contextlib.suppress(FileLockedError):
                return cls(FileLock(path), slot)
        raise AssertionError

    @property
    def slot(self) -> str:
        """What no other living client of the same name has, and the next start has again.

        Not the name, which is the machine's where none was given: that of a container changes.
        """
        return self._slot

    @property
    def value(self) -> str:
        """The id; empty when there is none yet."""
        return self._lock.read()

    def keep(self, client_id: str) -> None:
        """Note the id under which the network knows the client."""
        if client_id != self._lock.read():
            self._lock.write(client_id)


@contextlib.contextmanager
def opened_state(client_id: str, network: str, *, root: str | None) -> Iterator[StateFolder | None]:
    """Give a client's folder, open; None when nothing is to be kept, or when the default place cannot be used.

    `root` is what the user asked for. Raises StateInUseError, and StateError when that place cannot be used.
    """
    if root == IN_MEMORY:
        yield None
        return
    state = StateFolder.of(client_id, network, root=root)
    try:
        state.open()
    except StateInUseError:
        raise
    except StateError as error:
        if root is not None:
            raise
        # Nobody asked for this place: a user without a home, or a read-only container.
        logger.warning(
            "%s: what waits for the server is lost if the client dies; SCALEOUT_MP_STATE_DIR names another folder",
            error,
            extra={"action": "state_not_kept"},
        )
        yield None
        return
    try:
        yield state
    finally:
        state.close()
