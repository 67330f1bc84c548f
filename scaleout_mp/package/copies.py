"""Copies of this package, for environments that are to have it and nothing else of where it is installed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
import weakref
from typing import Final

import scaleout_mp
from scaleout_mp.package.locks import lock

#: Copies that stay although nobody uses them: each state of the package has one, and with an editable installation
#: each change makes a state.
_KEPT: Final = 4
_NAME: Final = re.compile(r"[0-9a-f]{16}")
#: Seconds after which what is no copy was left by a program that was killed while it made one.
_ABANDONED: Final = 3600.0


class PackageCopies:
    """Copies in a folder that all clients of a user share. The one in use stays as long as this object."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._in_use: dict[str, weakref.finalize[..., PackageCopies]] = {}

    def current(self) -> str:
        """Return the folder with a copy of this package as it is now; old ones that nobody uses may go."""
        source = os.path.dirname(os.path.abspath(scaleout_mp.__file__))
        root = os.path.join(self._folder, _digest(source))
        os.makedirs(self._folder, exist_ok=True)
        self._hold(root)
        if not os.path.isdir(root):
            with tempfile.TemporaryDirectory(dir=self._folder) as temporary:
                made = os.path.join(temporary, "root")
                shutil.copytree(source, os.path.join(made, "scaleout_mp"), ignore=shutil.ignore_patterns("__pycache__"))
                with contextlib.suppress(FileExistsError, OSError):
                    # Another client may have been faster.
                    os.rename(made, root)
            self._prune()
        return root

    def _hold(self, root: str) -> None:
        """Keep others from removing a copy, until this object is gone."""
        if root not in self._in_use:
            descriptor = _lock(root, fcntl.LOCK_SH)
            self._in_use[root] = weakref.finalize(self, os.close, descriptor)
        # Which was used last; the kernel's own clock for files is too coarse to tell.
        os.utime(_lock_file(root), ns=(time.time_ns(),) * 2)

    def _prune(self) -> None:
        """Remove all copies but the last ones, and those in use."""
        copies: list[str] = []
        others: list[str] = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    (copies if _NAME.fullmatch(entry.name) else others).append(entry.path)
        for path in sorted(copies, key=_last_use)[:-_KEPT]:
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                descriptor = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
                try:
                    shutil.rmtree(path)
                    os.unlink(_lock_file(path))
                finally:
                    os.close(descriptor)
        for path in others:
            with contextlib.suppress(FileNotFoundError):
                if time.time() - os.stat(path).st_mtime > _ABANDONED:
                    shutil.rmtree(path)


def _digest(source: str) -> str:
    """Return what is the same as long as names, sizes and times of the package's files are."""
    digest = hashlib.blake2b(source.encode(), digest_size=8)
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(names):
            facts = os.stat(os.path.join(folder, name))
            digest.update(f"\0{folder}/{name}\0{facts.st_size}\0{facts.st_mtime_ns}".encode())
    return digest.hexdigest()


def _lock_file(root: str) -> str:
    return f"{root}.lock"


def _last_use(root: str) -> float:
    with contextlib.suppress(FileNotFoundError):
        return os.stat(_lock_file(root)).st_mtime
    return 0.0


def _lock(root: str, kind: int) -> int:
    """Return a descriptor with the lock on a copy. Raises BlockingIOError, when it is not to wait, and OSError."""
    return lock(_lock_file(root), kind)
