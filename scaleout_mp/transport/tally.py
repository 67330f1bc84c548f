"""What became of the messages of an outbox, in numbers."""

from __future__ import annotations

import collections
import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutboxCounts:
    """How many messages went which way, since the start."""

    pending: int
    delivered: int
    #: Records that found the box full, or the disk, were given up, or are of a kind that the server does not know.
    dropped: int
    #: Messages that the combiner refused for good.
    refused: int


class Tally:
    """Counts messages as they come and go. Kept by the outbox."""

    def __init__(self) -> None:
        self.pending = self.delivered = self.refused = 0
        self.dropped = 0
        self._dropped_by: collections.Counter[str] = collections.Counter()

    def drop(self, lane: str, count: int = 1) -> None:
        """Count records that will not be sent."""
        self.dropped += count
        self._dropped_by[lane] += count

    def take_dropped(self, lane: str) -> int:
        """Return how many records of a lane were dropped, and forget it."""
        return self._dropped_by.pop(lane, 0)

    @property
    def counts(self) -> OutboxCounts:
        """All of it, at this moment."""
        return OutboxCounts(pending=self.pending, delivered=self.delivered, dropped=self.dropped, refused=self.refused)
