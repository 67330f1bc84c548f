"""A folder of its own for each task: made before it starts, removed with all that is in it when it is over.

The folders of one supervisor lie in a base folder that is locked as long as the supervisor lives, by flock(2) on the
folder itself. So a base whose lock can be had belongs to nobody any more, whoever has its owner's pid by now. The lock
also keeps systemd-tmpfiles from clearing it away as old.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import re
import secrets
import tempfile
import threading
from typing import Final, Self

from scaleout_mp.errors import ConfigError
from scaleout_mp.sandbox.removal import OPEN, Removal, remove_ownerless

logger = logging.getLogger(__name__)

#: Short: programs put sockets below it, whose path may have 107 bytes. Nothing else may have such a name: what has it,
#: locked by nobody, is removed.
_PREFIX: Final = "scaleout-scratch-"
_BASE: Final = re.compile(re.escape(_PREFIX) + "[0-9a-f]{8}")
_TRIES: Final = 100


class ScratchFolders:
    """The scratch folders of one supervisor's tasks. Every method may be called from any thread."""

    def __init__(self, parent: str, path: str, folder: int) -> None:
        """Take over a base folder that was made and locked by `make_base`."""
        self._parent = parent
        self._path = path
        #: The base, open, which holds the lock.
        self._folder = folder
        self._names = itertools.count(1)
        self._lock = threading.Lock()
        self._giving_up = threading.Event()

    @classmethod
    def make_base(cls, parent: str | os.PathLike[str] | None = None) -> Self:
        """Make and lock a base folder in `parent`, the temp folder by default.

        Raises ConfigError, which names the folder.
        """
        try:
            where = os.path.realpath(tempfile.gettempdir() if parent is None else parent)
            # It goes to the child in a frame, as text.
            where.encode()
            return cls(where, *_make_locked(where))
        except (OSError, UnicodeEncodeError) as error:
            place = "the temp folder" if parent is None else repr(os.fspath(parent))
            text = f"no scratch folders can be made in {place}: {error}; name another one with scratch_folder="
            raise ConfigError(text) from error

    @property
    def path(self) -> str:
        """The base folder."""
        return self._path

    def make(self, name: str = "") -> str:
        """Make an empty folder of mode 0700 and return its path; a base that was taken away is made anew.

        Raises OSError.
        """
        name = name or str(next(self._names))
        try:
            return self._make(name)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            # A task, or somebody who clears /tmp, was at it.
            with self._lock:
                self._mend_base()
            return self._make(name)

    def _make(self, name: str) -> str:
        path = f"{self._path}/{name}"
        os.mkdir(path, 0o700)
        return path

    def _mend_base(self) -> None:
        if _is_at(self._folder, self._path):
            os.fchmod(self._folder, 0o700)
            return
        lost, self._folder = self._folder, -1
        os.close(lost)
        self._path, self._folder = _make_locked(self._parent)

    def discard(self, path: str) -> bool:
        """Remove a folder if nothing is in it; return whether it is gone. Takes microseconds."""
        try:
            os.rmdir(os.path.basename(path), dir_fd=self._folder)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def remove(self, path: str) -> bool:
        """Remove a folder with all that is in it; return whether it is gone. May take long."""
        removal = Removal(give_up=self._giving_up.is_set)
        with self._lock:
            # One of its own: the base may be mended meanwhile.
            folder = os.dup(self._folder)
        try:
            if removal.remove(os.path.basename(path), folder):
                return True
        finally:
            os.close(folder)
        _tell(removal, path)
        return False

    def remove_left_over(self) -> None:
        """Remove the bases that other supervisors of this user left beside this one when they were killed."""
        parent = os.open(self._parent, OPEN)
        try:
            with os.scandir(parent) as entries:
                names = [entry.name for entry in entries if _BASE.fullmatch(entry.name)]
            for name in names:
                if self._giving_up.is_set():
                    return
                remove_ownerless(name, parent, self._giving_up.is_set)
        finally:
            os.close(parent)

    def give_up(self) -> None:
        """End the removals that run, here and on other threads. What is left goes with the next supervisor's start."""
        self._giving_up.set()

    def close(self) -> None:
        """Remove the base with whatever is still in it. Call it once, at the end."""
        try:
            parent = os.open(self._parent, OPEN)
        except FileNotFoundError:
            # Gone with all that was in it.
            os.close(self._folder)
            return
        try:
            if _is_at(self._folder, self._path):
                removal = Removal(give_up=self._giving_up.is_set)
                if not removal.remove(os.path.basename(self._path), parent):
                    # Once more: what is left may be elsewhere in it by now.
                    _tell(removal, self._path)
        finally:
            os.close(parent)
            os.close(self._folder)


def _tell(removal: Removal, path: str) -> None:
    if removal.problem is not None:
        logger.warning("cannot remove %s: %s", path, removal.problem, extra={"action": "scratch_left"})


def _make_locked(parent: str) -> tuple[str, int]:
    """Make a base folder and return its path and its descriptor, which holds the lock. Raises OSError."""
    for _ in range(_TRIES):
        path = f"{parent}/{_PREFIX}{secrets.token_hex(4)}"
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            continue
        folder = -1
        try:
            folder = os.open(path, OPEN)
            # Shared: on a network file system the other kind needs a file that is open for writing.
            fcntl.flock(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if _is_at(folder, path):
                return path, folder
        except (BlockingIOError, FileNotFoundError):
            # Between the two steps another supervisor took it for a left one, and has removed it or will.
            pass
        except OSError:
            if folder >= 0:
                os.close(folder)
            with contextlib.suppress(OSError):
                os.rmdir(path)
            raise
        if folder >= 0:
            os.close(folder)
    raise FileExistsError(f"no name for a folder in {parent} after {_TRIES} tries")


def _is_at(folder: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(folder), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
