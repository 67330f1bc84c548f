"""Whether the combiner answers, said in the log once per outage instead of once per attempt."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

from scaleout_mp.transport.link_quality import LinkQuality

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

#: Seconds in which the same call that fails again and again is one warning.
QUIET: Final = 60.0


class LinkWatch:
    """Shared by all that call the combiner: the first failure is a warning, the recovery says how long."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, repeat_level: int = logging.DEBUG) -> None:
        """Log the second and further failures of an outage at `repeat_level`."""
        self._clock = clock
        self._repeat_level = repeat_level
        self._down_since: float | None = None
        #: Whether this outage is in the log, and when each call's failure was said last.
        self._said = False
        self._said_of: dict[str, float] = {}
        #: Whether it answers well.
        self.quality = LinkQuality(clock)
        #: How many outages there were so far: after one, the server may be another.
        self.outages = 0

    @property
    def down(self) -> bool:
        """Whether the last call failed for the link's sake."""
        return self._down_since is not None

    def failed(self, what: str, error: Exception, again_in: float) -> None:
        """Note a failed call that is tried again in `again_in` seconds."""
        self.quality.failed()
        now = self._clock()
        if self._down_since is None:
            self._down_since = now
            self._said = False
            self.outages += 1
        level = self._repeat_level
        # One call may fail for long while others come through.
        if not self._said and now - self._said_of.get(what, -QUIET) >= QUIET:
            level, self._said = logging.WARNING, True
            self._said_of[what] = now
        logger.log(
            level,
            "%s failed: %s; trying again in %.1f s",
            what,
            error,
            again_in,
            extra={"action": "link_failed"},
        )

    def succeeded(self) -> None:
        """Note a call that was answered."""
        self.quality.answered()
        if self._down_since is not None:
            away = self._clock() - self._down_since
            self._down_since = None
            level = logging.INFO if self._said else logging.DEBUG
            logger.log(level, "the combiner answers again after %.1f s", away, extra={"action": "link_restored"})
