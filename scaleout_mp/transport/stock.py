"""How many records wait, of which class, and how many may."""

from __future__ import annotations

import collections
import dataclasses
from typing import TYPE_CHECKING, Final

from scaleout_mp.transport.message import MessageClass

if TYPE_CHECKING:
    from collections.abc import Iterable

    from scaleout_mp.transport.message import Ticket


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """How much of one class may wait; what comes beyond is dropped and counted."""

    records: int
    bytes: int


#: Results are few, and are never dropped.
BOUNDS: Final = {
    MessageClass.METRIC: Bound(records=1_000_000, bytes=256 << 20),
    MessageClass.TELEMETRY: Bound(records=100_000, bytes=32 << 20),
}


class Stock:
    """Counts and bytes of records by class; of results it takes no notice."""

    def __init__(self) -> None:
        self.records: collections.Counter[MessageClass] = collections.Counter()
        self.bytes: collections.Counter[MessageClass] = collections.Counter()

    def add(self, rank: MessageClass, records: int, size: int) -> None:
        """Count records in, or out when the numbers are negative."""
        if rank is not MessageClass.RESULT:
            self.records[rank] += records
            self.bytes[rank] += size

    def add_all(self, other: Stock) -> None:
        """Count in what another stock has."""
        self.records.update(other.records)
        self.bytes.update(other.bytes)

    def subtract(self, other: Stock) -> None:
        """Count out what another stock has."""
        self.records.subtract(other.records)
        self.bytes.subtract(other.bytes)

    def has_room(self, rank: MessageClass, size: int, bound: Bound | None) -> bool:
        """Whether one more record of that size keeps within the bound."""
        return bound is None or (self.records[rank] < bound.records and self.bytes[rank] + size <= bound.bytes)

    @classmethod
    def of(cls, tickets: Iterable[Ticket]) -> Stock:
        """Return the stock that some messages are."""
        stock = cls()
        for ticket in tickets:
            stock.add(ticket.rank, 1, len(ticket.packed))
        return stock

    @property
    def total(self) -> int:
        """How many records there are."""
        return self.records.total()
