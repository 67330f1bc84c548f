"""What became of the messages of an outbox, in numbers."""

from __future__ import annotations

import collections
import dataclasses
import logging
from typing import TYPE_CHECKING, Final

from scaleout_mp.transport.message import MessageClass, MessageKind

if TYPE_CHECKING:
    from scaleout_mp.errors import TransportError
    from scaleout_mp.transport.message import Ticket

logger = logging.getLogger(__name__)

_NAMES: Final = {
    MessageKind.METRIC: "metrics",
    MessageKind.ATTRIBUTES: "attributes",
    MessageKind.TELEMETRY: "telemetry",
    MessageKind.INFERENCE_RESULT: "results of inference",
}


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


class Refusals:
    """Says what the server refuses: of results each, of records once for each kind, for there may be a million."""

    def __init__(self) -> None:
        self._refused: set[MessageKind] = set()
        self._unknown: set[MessageKind] = set()

    def taken(self, ticket: Ticket) -> None:
        """Note that a message arrived: the next refusal of its kind is news."""
        self._refused.discard(ticket.kind)

    def refused(self, ticket: Ticket, error: TransportError) -> None:
        """Say that a message will never be taken."""
        again = ticket.rank is not MessageClass.RESULT and ticket.kind in self._refused
        self._refused.add(ticket.kind)
        logger.log(
            logging.DEBUG if again else logging.ERROR,
            "the combiner refused a message for good: %s",
            error,
            extra={"action": "message_refused"},
        )

    def unknown(self, ticket: Ticket) -> None:
        """Say that the server has no call for records of a kind: it may be older than release 1.1."""
        if ticket.kind in self._unknown:
            return
        self._unknown.add(ticket.kind)
        what = _NAMES.get(ticket.kind, ticket.kind.value.name)
        logger.warning("the server takes no %s; they are dropped", what, extra={"action": "records_unknown"})
