"""Which environments are in use, and the end of those that nobody has used for long."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import time
import uuid
import weakref
from typing import Final

from scaleout_mp.package.locks import lock

logger = logging.getLogger(__name__)

#: Days after which an environment that nobody has used is removed.
UNUSED_DAYS: Final = 30
_NAME: Final = re.compile(r"[0-9a-f]{24}")
#: Begins the names of environments that are being removed.
_REMOVED: Final = ".removed-"


class EnvironmentUses:
    """Environments of a folder that all clients of a user share. Those in use stay as long as this object."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._held: dict[str, weakref.finalize[..., EnvironmentUses]] = {}

    def hold(self, path: str) -> None:
        """Note that an environment is used, and keep it, until this object is gone. The caller has its lock."""
        if path not in self._held:
            self._held[path] = weakref.finalize(self, _let_go, lock(_used_file(path), fcntl.LOCK_SH))
        os.utime(_used_file(path))

    def prune(self) -> None:
        """Remove what nobody has used for so many days, and what a removal that was cut off has left."""
        try:
            names = os.listdir(self._folder)
            for path in (os.path.join(self._folder, name) for name in names if _NAME.fullmatch(name)):
                if _is_old(path):
                    self._remove(path)
            for name in os.listdir(self._folder):
                if name.startswith(_REMOVED):
                    shutil.rmtree(os.path.join(self._folder, name), ignore_errors=True)
        except OSError as error:
            # Somebody wants an environment, which is there.
            logger.warning("old environments are not removed: %s", error, extra={"action": "environments_kept"})

    def _remove(self, path: str) -> None:
        with contextlib.ExitStack() as stack:
            try:
                # In this order: who takes an environment into use has the first lock.
                for file in (lock_file(path), _used_file(path)):
                    stack.callback(os.close, lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB))
            except BlockingIOError:
                return
            if not _is_old(path):
                return
            # At once, or half of one could be taken for whole.
            os.rename(path, os.path.join(self._folder, f"{_REMOVED}{uuid.uuid4().hex}"))
            os.unlink(_used_file(path))
            os.unlink(lock_file(path))
        logger.info(
            "an environment that nobody has used for %d days is removed: %s",
            UNUSED_DAYS,
            path,
            extra={"action": "environment_removed"},
        )


def lock_file(path: str) -> str:
    """Return the file whose lock has who builds an environment, looks at it or removes it."""
    return f"{path}.lock"


def _used_file(path: str) -> str:
    return f"{path}.used"


def _is_old(path: str) -> bool:
    """Say whether an environment was last used long ago. Raises OSError."""
    try:
        return time.time() - os.stat(_used_file(path)).st_mtime > UNUSED_DAYS * 86_400
    except FileNotFoundError:
        # Made by a release that did not note it: from now on.
        if os.path.isdir(path):
            os.close(os.open(_used_file(path), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        return False


def _let_go(descriptor: int) -> None:
    # Used until now, which may be long after it was taken.
    with contextlib.suppress(OSError):
        os.utime(descriptor)
    os.close(descriptor)
