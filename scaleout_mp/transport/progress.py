"""How far a model on its way has come."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

#: Seconds between two lines in the log at least, and share of the model that has come meanwhile.
QUIET: Final = 10.0
STEP: Final = 0.1


class Progress:
    """One upload or download. Kept on one loop; read from any thread."""

    def __init__(
        self, verb: str, model_id: str, total: int | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`verb` is for people, "uploaded" for example. `total` is in bytes; None when nobody knows it."""
        self.total = total
        #: Bytes so far.
        self.done = 0
        self._verb = verb
        self._model_id = model_id
        self._clock = clock
        self._begun_at = self._said_at = clock()
        self._said = 0

    def again(self) -> None:
        """Note that the transfer starts anew."""
        self.done = self._said = 0

    def add(self, count: int) -> None:
        """Note that so many bytes more have come; says it now and then."""
        self.done += count
        now = self._clock()
        if now - self._said_at < QUIET or (self.total and self.done - self._said < STEP * self.total):
            return
        self._said_at, self._said = now, self.done
        self._say(now, f"{self.done / self.total:.0%}" if self.total else "so far")

    def finish(self) -> None:
        """Note that all has come; says it when it took so long that somebody may have wondered."""
        now = self._clock()
        self.total = self.done
        if now - self._begun_at >= QUIET:
            self._say(now, "done")

    def _say(self, now: float, what: str) -> None:
        seconds = max(now - self._begun_at, 1e-9)
        logger.info(
            "model %s %s: %.1f MB, %s, %.1f MB/s",
            self._model_id,
            self._verb,
            self.done / 1e6,
            what,
            self.done / 1e6 / seconds,
            extra={"action": "model_progress", "model_id": self._model_id, "bytes": self.done, "total": self.total},
        )
