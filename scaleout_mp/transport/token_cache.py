"""Tokens on disk: who loses a rotated refresh token is locked out."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import time
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.errors import ApiUnavailableError
from scaleout_mp.transport.token_api import TokenSet, is_token

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

logger = logging.getLogger(__name__)

_VERSION: Final = 1
#: Seconds to wait for another process that refreshes the same token; its request gives up well before.
_LOCK_WAIT: Final = 30.0
_LOCK_LOOK: Final = 0.05
#: Bytes; a file that is larger is not ours.
_MAX_SIZE: Final = 1 << 20


class TokenCache:
    """One token's file, for all processes of this user that were given the same token.

    The file's name is a digest of what the user gave, so a new token never meets what an old one left. A disk that
    does not take the file costs a warning and no more: the tokens are in memory all the same.
    """

    def __init__(
        self,
        folder: Path,
        *given: str,
        spare: Path | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep in `folder` what was had for `given`: address, token, and who uses it.

        `spare` is the file of another cache that is nobody's yet: the first who has nothing makes it its own.
        """
        digest = hashlib.sha256("\0".join(given).encode()).hexdigest()[:32]
        self._folder = folder
        self._spare = spare
        self.path = folder / f"scaleout-mp-{digest}.json"
        self._sleep = sleep
        self._clock = clock
        self._warned = False

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from refreshing the same token at the same time: the server takes it once.

        Raises ApiUnavailableError when another process does not let go.
        """
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Never removed: who waits for a file that is gone would hold a lock of its own.
            fd = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            self._warn(error)
            yield
            return
        try:
            self._lock(fd)
            yield
        finally:
            os.close(fd)

    def _lock(self, fd: int) -> None:
        deadline = self._clock() + _LOCK_WAIT
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if self._clock() > deadline:
                    raise ApiUnavailableError(
                        f"another process has been refreshing the same token for {_LOCK_WAIT:.0f} s "
                        f"(lock {self.path.with_suffix('.lock')})"
                    ) from None
                # flock(2) has no wait with a deadline, and a holder may be stopped.
                self._sleep(_LOCK_LOOK)
            except OSError as error:
                # File systems without locks.
                self._warn(error)
                return

    def load(self) -> TokenSet | None:
        """Return what was kept; None when there is nothing, or nothing that can be trusted."""
        if self._spare is not None and not os.path.lexists(self.path):
            # At once or not at all: of two clients that find it, one has it.
            with contextlib.suppress(OSError):
                os.rename(self._spare, self.path)
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(error)
            return None
        try:
            return self._read_own(fd)
        except OSError as error:
            # A folder in the file's place, or a disk that fails.
            self._ignore(f"it cannot be read ({error.strerror})")
            return None
        finally:
            os.close(fd)

    def _read_own(self, fd: int) -> TokenSet | None:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid():
            self._ignore("it belongs to another user")
            return None
        if status.st_mode & 0o077:
            logger.warning("the kept token %s could be read by others", self.path, extra={"action": "token_cache_open"})
            # Where the file system is read-only, it stays so.
            with contextlib.suppress(OSError):
                os.fchmod(fd, 0o600)
        try:
            return _read(json.loads(os.read(fd, _MAX_SIZE)))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            self._ignore(f"it cannot be read ({type(error).__name__})")
            return None

    def store(self, tokens: TokenSet) -> None:
        """Keep tokens; they are on the disk when this returns, or a warning is in the log."""
        fields = {
            "version": _VERSION,
            "access_token": tokens.access,
            "refresh_token": tokens.refresh,
            "obtained_at": tokens.obtained_at,
            "expires_at": tokens.expires_at,
            "client_id": tokens.client_id,
        }
        beside = self.path.with_suffix(f".{os.getpid()}.part")
        try:
            _write_whole(beside, json.dumps(fields).encode())
            os.replace(beside, self.path)
            _sync_folder(self._folder)
        except OSError as error:
            self._warn(error)
            with contextlib.suppress(OSError):
                beside.unlink()

    def _ignore(self, why: str) -> None:
        logger.warning("the kept token %s is ignored: %s", self.path, why, extra={"action": "token_cache_ignored"})

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "tokens cannot be kept in %s (%s): where the server replaces refresh tokens, a restart will need a new "
                "one; SCALEOUT_TOKEN_CACHE_DIR names another folder, SCALEOUT_PERSIST_TOKENS=false keeps none",
                self._folder,
                error.strerror or error,
                extra={"action": "token_cache_failed"},
            )


def _read(fields: Any) -> TokenSet:
    if fields["version"] != _VERSION:
        raise ValueError("another version")
    texts = {name: fields[name] for name in ("access_token", "refresh_token", "client_id")}
    if not all(isinstance(text, str) for text in texts.values()):
        raise TypeError("not text")
    obtained_at, expires_at = float(fields["obtained_at"]), float(fields["expires_at"])
    if not is_token(texts["access_token"]) or not math.isfinite(obtained_at) or not math.isfinite(expires_at):
        raise ValueError("no token, or no time")
    return TokenSet(
        access=texts["access_token"],
        refresh=texts["refresh_token"],
        obtained_at=obtained_at,
        expires_at=expires_at,
        client_id=texts["client_id"],
    )


def _write_whole(path: Path, data: bytes) -> None:
    # What a killed process of the same number left may be there; O_EXCL sees to it that the mode is ours.
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
