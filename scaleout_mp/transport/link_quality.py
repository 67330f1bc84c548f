"""How good the link to the combiner is: healthy or degraded, by round trips and by the channel's state.

Pure: the clock is given. A link degrades when round trips are slow several times in a row, when nothing was answered
for long, or at once when the channel says that it fails. It is healthy again only after more good round trips in a
row, at half of what counted as slow and less, so that a link at the edge does not go back and forth.
"""

from __future__ import annotations

import collections
import enum
import logging
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

logger = logging.getLogger(__name__)

#: Round trips whose median counts.
WINDOW: Final = 10
#: Seconds of that median above which a look is bad, and below which it is good; between, it says nothing.
SLOW: Final = 1.5
QUICK: Final = 0.5
#: Bad looks in a row that degrade a link, and good ones that heal it.
BAD_LOOKS: Final = 3
GOOD_LOOKS: Final = 5
#: Seconds without an answer after which a failure degrades the link.
SILENCE: Final = 30.0


class LinkState(enum.StrEnum):
    """What there is to be said of a link."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"


def _median(values: Iterable[float]) -> float:
    # Not of `statistics`: that loads a megabyte of decimals and fractions.
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


class LinkQuality:
    """Judges one link. Fed on one loop; read from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._round_trips: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._state = LinkState.HEALTHY
        self._bad = self._good = 0
        self._answered_at = clock()
        self._channel_failing = False

    @property
    def state(self) -> LinkState:
        """How the link is."""
        return self._state

    @property
    def round_trip(self) -> float | None:
        """Median of the last round trips in seconds; None before there was one."""
        return _median(self._round_trips) if self._round_trips else None

    def measured(self, seconds: float) -> None:
        """Note how long a call took that costs the server next to nothing."""
        self._round_trips.append(seconds)
        median = _median(self._round_trips)
        if median > SLOW:
            self._bad, self._good = self._bad + 1, 0
        elif median < QUICK:
            self._bad, self._good = 0, self._good + 1
        if self._bad >= BAD_LOOKS:
            self._become(LinkState.DEGRADED, f"a round trip takes {median:.1f} s")
        elif self._good >= GOOD_LOOKS and not self._channel_failing:
            self._become(LinkState.HEALTHY, f"a round trip takes {median:.2f} s")

    def answered(self) -> None:
        """Note that a call was answered."""
        self._answered_at = self._clock()
        self._channel_failing = False

    def failed(self) -> None:
        """Note that a call failed for the link's sake."""
        self._good = 0
        silence = self._clock() - self._answered_at
        if silence >= SILENCE:
            self._become(LinkState.DEGRADED, f"no answer for {silence:.0f} s")

    def channel(self, *, failing: bool) -> None:
        """Note the channel's state, when it changes."""
        self._channel_failing = failing
        if failing:
            self._become(LinkState.DEGRADED, "the channel cannot connect")

    def _become(self, state: LinkState, why: str) -> None:
        if state is LinkState.DEGRADED:
            self._good = 0
        if state is not self._state:
            self._state = state
            logger.info("the link is %s: %s", state, why, extra={"action": f"link_{state}"})
