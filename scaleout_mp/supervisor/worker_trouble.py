"""How long a worker that does not live to answer is left alone. Pure."""

from __future__ import annotations

from typing import Final

from scaleout_mp.transport.backoff import Backoff

#: From the second death in a row; the first costs no time.
_BACKOFF: Final = Backoff(first=0.25, cap=30.0, jitter=0.1)
#: Seconds for which one is left alone at most that was ready when a request killed it: the next request is another.
_MOST_WHEN_READY: Final = 0.5


class WorkerTrouble:
    """Counts the deaths of one worker since it last did what it was asked."""

    def __init__(self, backoff: Backoff = _BACKOFF) -> None:
        self._backoff = backoff
        self._until = 0.0
        #: Deaths in a row.
        self.deaths = 0
        #: How the last one came about.
        self.said = ""

    def died(self, said: str, now: float, *, ready: bool) -> None:
        """Note that the worker is gone, which was `ready` for requests, or could not be made so.

        `now` is on a monotonic clock, in seconds.
        """
        self.deaths += 1
        self.said = said
        wait = self._backoff.delay(self.deaths - 1) if self.deaths > 1 else 0.0
        self._until = now + (min(wait, _MOST_WHEN_READY) if ready else wait)

    def lived(self) -> None:
        """Note that the worker did what it was asked, and goes on."""
        self.deaths = 0

    def wait(self, now: float) -> float:
        """Return the seconds until it is worth another try."""
        return max(0.0, self._until - now) if self.deaths else 0.0
