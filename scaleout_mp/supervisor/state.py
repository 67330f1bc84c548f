"""The folder in which a client keeps what must outlive it: the journal, and results on their way to the server."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import threading
from typing import TYPE_CHECKING, Final

from scaleout_mp.config import state_folder
from scaleout_mp.errors import StateError, StateInUseError
from scaleout_mp.model.files import replace_file

if TYPE_CHECKING:
    from collections.abc import Collection

    from scaleout_mp.model import ScaleoutModel

logger = logging.getLogger(__name__)

#: Where a setting says this, nothing is kept on the disk.
IN_MEMORY: Final = ":memory:"

_SUFFIX: Final = ".scm"
_CHUNK: Final = 16 << 20

#: Folders that clients of this process use. Locks of fcntl(2) hold between processes only; but unlike those of flock(2)
#: they do not pass to what the user's program forks, which may outlive a client that was killed.
_open_here: set[str] = set()
_opening = threading.Lock()


class StateFolder:
    """One client's folder, locked as long as it is open: two clients with one id would take each other's messages."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.journal_path = os.path.join(path, "journal.db")
        self._results = os.path.join(path, "results")
        self._lock: int | None = None

    @classmethod
    def of(cls, client_id: str, network: str, *, root: str | None) -> StateFolder:
        """Return the folder of a client in a network.

        What waits for one server must never reach another; so the network, as its address, is part of the name.
        """
        base = root or os.path.join(state_folder(), "clients")
        digest = hashlib.sha256(f"{network}\n{client_id}".encode()).hexdigest()[:12]
        readable = re.sub(r"[^A-Za-z0-9._-]", "_", client_id)[:80].lstrip(".") or "client"
        return cls(os.path.join(os.path.abspath(base), f"{readable}-{digest}"))

    def open(self) -> None:
        """Make the folder, for this user alone, and lock it.

        Raises StateInUseError when another client has it, StateError when it cannot be made or written.
        """
        try:
            os.makedirs(self._results, mode=0o700, exist_ok=True)
            with _opening:
                self._take_lock(os.path.realpath(self.path))
        except OSError as error:
            raise StateError(f"{self.path} cannot be used: {error.strerror or error}") from error

    def _take_lock(self, path: str) -> None:
        if path in _open_here:
            raise StateInUseError(f"another client of this program uses {self.path}; give each an id of its own")
        fd = os.open(os.path.join(path, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(fd, 20, 0).decode("ascii", "replace").strip()
            os.close(fd)
            raise StateInUseError(
                f"another client with this id runs on this machine (process {owner or 'unknown'}) and uses "
                f"{self.path}; end it, or give this one an id of its own"
            ) from None
        except OSError:
            os.close(fd)
            raise
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        self._lock = fd
        _open_here.add(path)

    def close(self) -> None:
        """Unlock the folder. Safe to call again."""
        with _opening:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None
                _open_here.discard(os.path.realpath(self.path))

    # Results on their way

    def keep_result(self, model: ScaleoutModel, update_id: str) -> None:
        """Write a model to disk, safe from a loss of power. Raises OSError. Call it on a thread."""
        replace_file(self._result_path(update_id), *model.iter_chunks(_CHUNK), sync=True)

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
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._result_path(update_id))

    def sweep(self, wanted: Collection[str]) -> None:
        """Remove what a killed client left: all results but those wanted."""
        kept = {update_id + _SUFFIX for update_id in wanted}
        for name in os.listdir(self._results):
            if name not in kept:
                os.unlink(os.path.join(self._results, name))
                logger.debug("removed the left-over %s", name, extra={"action": "result_swept"})

    def _result_path(self, update_id: str) -> str:
        return os.path.join(self._results, update_id + _SUFFIX)
