"""SHA-256 of bytes on their way into memory, on another core."""

from __future__ import annotations

import hashlib
import queue
import threading
from typing import Final

#: From this many bytes on a thread pays.
_LARGE: Final = 1 << 18
#: Writes that may wait to be hashed. What they hold of memory of their own is bounded with that.
_MOST_WAITING: Final = 4

_Parts = tuple[bytes | bytearray | memoryview, ...]


class RunningHash:
    """Hashes what it is given, in order, behind the back of who gives it."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._waiting: queue.Queue[_Parts | None] = queue.Queue(_MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._failed: Exception | None = None

    def update(self, parts: _Parts) -> None:
        """Take bytes, which must not be changed before `hexdigest` has returned."""
        if self._thread is None and sum(memoryview(part).nbytes for part in parts) >= _LARGE:
            thread = threading.Thread(target=self._run, name="sha256", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                # A task may not be allowed another thread.
                pass
            else:
                self._thread = thread
        if self._thread is None:
            self._hash(parts)
        else:
            self._waiting.put(parts)

    def hexdigest(self) -> str:
        """Wait until all is hashed and return the sum in hex."""
        self.stop()
        if self._failed is not None:
            raise self._failed
        return self._digest.hexdigest()

    def stop(self) -> None:
        """Give the thread back; no more bytes can be taken."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (parts := self._waiting.get()) is not None:
            if self._failed is not None:
                continue
            try:
                self._hash(parts)
            except Exception as error:  # noqa: BLE001 - raised again where the sum is asked for
                self._failed = error

    def _hash(self, parts: _Parts) -> None:
        for part in parts:
            self._digest.update(part)
