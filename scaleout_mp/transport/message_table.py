"""Messages in the journal: results and statuses in one table, records, which may be a million, in another."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Final

from scaleout_mp.transport.message import MessageClass, MessageKind, Ticket
from scaleout_mp.transport.salvage import can_be_read

if TYPE_CHECKING:
    from collections.abc import Callable

    from scaleout_mp.transport.journal import Journal

logger = logging.getLogger(__name__)

_KINDS: Final = frozenset(MessageKind.__members__)

_INSERT_RESULT: Final = "INSERT OR REPLACE INTO results(lane, id, kind, packed) VALUES(?, ?, ?, ?)"
_INSERT_RECORD: Final = "INSERT OR REPLACE INTO records(lane, id, kind, packed) VALUES(?, ?, ?, ?)"
_DELETE_RESULT: Final = "DELETE FROM results WHERE id = ?"
_DELETE_RECORD: Final = "DELETE FROM records WHERE lane = ? AND id = ?"
_DELETE_RECORDS: Final = "DELETE FROM records WHERE lane = ?"
_DELETE_KIND: Final = ("DELETE FROM results WHERE kind = ?", "DELETE FROM records WHERE kind = ?")
_PAGE: Final = "SELECT id, kind, packed FROM records WHERE lane = ? AND id > ? ORDER BY id LIMIT ?"
_LEFT_RESULTS: Final = "SELECT id, lane, kind, packed FROM results ORDER BY id"
_LEFT_RECORDS: Final = "SELECT lane, kind, count(*), sum(length(packed)), max(id) FROM records GROUP BY lane, kind"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftRecords:
    """Records of one class and lane that an earlier run of the client left."""

    lane: str
    rank: MessageClass
    count: int
    bytes: int
    last_id: int


class MessageTable:
    """The outbox's part of the journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.path = journal.path

    def add(self, ticket: Ticket) -> None:
        """Store a message, unless it is settled before the journal comes to it."""
        result = ticket.rank is MessageClass.RESULT
        row = (ticket.lane, ticket.id, ticket.kind.name, ticket.packed)
        self._journal.write(_INSERT_RESULT if result else _INSERT_RECORD, row, vital=result, ticket=ticket)

    def remove(self, ticket: Ticket) -> None:
        """Forget a message that is settled."""
        if not ticket.stored:
            return
        if ticket.rank is MessageClass.RESULT:
            self._journal.write(_DELETE_RESULT, (ticket.id,))
        else:
            # One that comes back after a crash is one that arrives twice.
            self._journal.write(_DELETE_RECORD, (ticket.lane, ticket.id), vital=False)

    def remove_records(self, lane: str) -> None:
        """Forget all records of a lane."""
        self._journal.write(_DELETE_RECORDS, (lane,), vital=False)

    def fetch(self, lane: str, after: int, count: int, then: Callable[[list[Ticket]], None]) -> None:
        """Have `then` called on the loop with the records of a lane that follow the one with the id `after`."""

        def on_rows(rows: list[tuple[int, str, bytes]]) -> None:
            then([ticket for row in rows if (ticket := self._ticket(row[0], lane, *row[1:])) is not None])

        self._journal.read(_PAGE, (lane, after, count), on_rows)

    async def left_results(self) -> list[Ticket]:
        """Return the results and statuses that an earlier run left, in order."""
        rows = await self._journal.rows(_LEFT_RESULTS)
        self._forget_unknown({kind for *_, kind, _ in rows})
        return [ticket for row in rows if (ticket := self._ticket(*row)) is not None]

    async def left_records(self) -> list[LeftRecords]:
        """Return how many records an earlier run left."""
        rows = await self._journal.rows(_LEFT_RECORDS)
        self._forget_unknown({kind for _, kind, *_ in rows})
        return [
            LeftRecords(lane=lane, rank=MessageKind[kind].message_class, count=count, bytes=size, last_id=last)
            for lane, kind, count, size, last in rows
            if kind in _KINDS
        ]

    def _ticket(self, number: int, lane: str, kind: str, packed: bytes) -> Ticket | None:
        """Return a message as it was left; None, and forget it, when it cannot be sent."""
        if kind not in _KINDS:
            return None
        ticket = Ticket(number, lane, MessageKind[kind], packed, stored=True)
        if can_be_read(ticket.kind, packed):
            return ticket
        logger.error(
            "%s has a damaged message (%s %d); it is forgotten",
            self.path,
            kind,
            number,
            extra={"action": "message_damaged", "task_id": lane},
        )
        self.remove(ticket)
        return None

    def _forget_unknown(self, kinds: set[str]) -> None:
        """Forget messages that this version of the package does not know, or that are damaged: they cannot be sent."""
        for kind in kinds - _KINDS:
            logger.error(
                "%s has messages of a kind that nobody knows (%s); they are forgotten",
                self.path,
                kind,
                extra={"action": "messages_unknown"},
            )
            for statement in _DELETE_KIND:
                self._journal.write(statement, (kind,))
