"""The messages of one task, in the order in which they were put, and how many of them may be under way at once.

Pure: no clock, no calls, no disk.

Records go out in order. While one after the other keeps up with the task, that is how they go; when more wait than
round trips fit into a moment, several are under way at once. Servers may take those in another order than they were
sent, and one whose call fails arrives late. So each failure shrinks the window to one call, and it grows again from
success to success: over a link that fails, messages go one by one. A record's time stamp, which grows from record to
record of a task, tells the order in any case. Results wait for all that was put before them, and all waits for them.
"""

from __future__ import annotations

import asyncio
import collections
import heapq
import itertools
from typing import TYPE_CHECKING, Final

from scaleout_mp.transport.message import MessageClass, Ticket
from scaleout_mp.transport.stock import Stock

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Records of a lane that may be under way at once.
WINDOW: Final = 64
#: Seconds within which all that waits should be gone, as far as the window allows it.
_MOMENT: Final = 0.25
#: Calls in a second that are worth having enough under way for: more keep a core busy, and only hold up polls. And how
#: many may be under way in any case.
_RATE: Final = 2_000
_AT_ONCE: Final = 16
#: Share of the newest in the mean of round trips.
_NEWEST: Final = 0.1
#: Records of a lane that are held in memory; the others lie in the journal until their turn comes.
HELD: Final = 4_000
#: Times in a row that a message is sent again whose call fails by what may be a bug of the server's: a result, or a
#: record. Behind one that was given up for that, each has a single try until one arrives.
PATIENCE: Final = 8
PATIENCE_WITH_RECORDS: Final = 4
#: Records left in memory when more are fetched, and how many then.
LOW: Final = 1_000
PAGE: Final = 2_000


class Pace:
    """How long calls take. Shared by all lanes of a link."""

    def __init__(self, round_trip: float = 0.005) -> None:
        """Assume that a call takes `round_trip` seconds, until it is known."""
        self.round_trip = round_trip

    def measured(self, seconds: float) -> None:
        """Note how long a call took."""
        self.round_trip += _NEWEST * (seconds - self.round_trip)

    def calls_for(self, pending: int) -> int:
        """Return how many calls at once are enough for that many messages."""
        enough = max(_AT_ONCE, _RATE * self.round_trip)
        return max(1, int(min(enough, pending * self.round_trip / _MOMENT)))


class Lane:
    """One task's messages. All that belong to no task share a lane, too."""

    def __init__(self, name: str, pace: Pace, *, held: int | None = HELD) -> None:
        """Hold that many records in memory at most; None: all."""
        self.name = name
        self._pace = pace
        #: Records that lie in the journal alone; their ids are above all those in memory.
        self.spilled = 0
        #: All records, wherever they lie. Kept by the outbox.
        self.stock = Stock()
        #: The last record that is or was in memory.
        self.read_to = 0
        #: A page is being fetched; its number, so that one that comes too late is known.
        self.fetching = False
        self.epoch = 0
        #: Failures in a row; while `waiting`, nothing is sent.
        self.failures = 0
        self.waiting = False
        self._doubts = 0
        self.done: asyncio.Event = asyncio.Event()
        self._results: collections.deque[Ticket] = collections.deque()
        self._records: collections.deque[Ticket] = collections.deque()
        self._again: list[tuple[int, Ticket]] = []
        self._under_way: dict[int, Ticket] = {}
        self._window = WINDOW
        self._held = held
        self._results_only = False

    # What is in it

    @property
    def pending(self) -> int:
        """How many messages are not settled."""
        return len(self._results) + len(self._records) + self.spilled + len(self._again) + len(self._under_way)

    @property
    def finished(self) -> bool:
        """Whether nothing is left that this run of the client still sends."""
        if not self._results_only:
            return self.pending == 0
        return not self._results and not any(t.rank is MessageClass.RESULT for t in self._open())

    def _open(self) -> Iterable[Ticket]:
        yield from (ticket for _, ticket in self._again)
        yield from self._under_way.values()

    def unsettled(self) -> list[Ticket]:
        """Return all messages in memory that are not settled."""
        return [*self._open(), *self._results, *self._records]

    def oldest(self) -> Ticket | None:
        """Return the message that was put first of those in memory."""
        first = (*self._open(), *itertools.islice(self._results, 1), *itertools.islice(self._records, 1))
        return min(first, key=lambda ticket: ticket.id, default=None)

    def append(self, ticket: Ticket) -> None:
        """Add a message at the end."""
        if ticket.rank is MessageClass.RESULT:
            self._results.append(ticket)
            self.done.clear()
            return
        if self.spilled or (self._held is not None and len(self._records) >= self._held):
            ticket.spilled = True
            self.spilled += 1
        else:
            self._records.append(ticket)
            self.read_to = ticket.id

    @property
    def wants_page(self) -> bool:
        """Whether records should be fetched from the journal."""
        return self.spilled > 0 and not self.fetching and not self._results_only and len(self._records) < LOW

    def fetched(self, tickets: list[Ticket]) -> None:
        """Take the records that follow those in memory."""
        self.fetching = False
        self.spilled = max(0, self.spilled - len(tickets))
        self._records.extend(tickets)
        if tickets:
            self.read_to = tickets[-1].id

    def remove_records(self) -> list[Ticket]:
        """Take out all records, those under way included; return those in memory."""
        taken = [ticket for ticket in self.unsettled() if ticket.rank is not MessageClass.RESULT]
        self._records.clear()
        self._again = [(number, ticket) for number, ticket in self._again if ticket.rank is MessageClass.RESULT]
        for ticket in taken:
            self._under_way.pop(ticket.id, None)
        self.spilled = 0
        self.fetching = False
        self.epoch += 1
        return taken

    def send_results_only(self) -> None:
        """Leave records where they are, from now on."""
        self._results_only = True

    # What goes next

    def next_rank(self) -> MessageClass | None:
        """Return how much the message matters that may go out now; None when none may."""
        ticket = self._next()
        return None if ticket is None else ticket.rank

    def _next(self) -> Ticket | None:
        if self.waiting:
            return None
        ticket = self._first()
        if ticket is None or not self._under_way:
            return ticket
        if self._results_only:
            return None if any(t.rank is MessageClass.RESULT for t in self._under_way.values()) else ticket
        if ticket.rank is MessageClass.RESULT:
            return None
        if len(self._under_way) >= min(self._window, self._pace.calls_for(self.pending)):
            return None
        # A result is alone under way.
        return None if next(iter(self._under_way.values())).rank is MessageClass.RESULT else ticket

    def _first(self) -> Ticket | None:
        if self._results_only:
            return next((t for _, t in sorted(self._again) if t.rank is MessageClass.RESULT), None) or (
                self._results[0] if self._results else None
            )
        if self._again:
            return self._again[0][1]
        result = self._results[0] if self._results else None
        if self._records:
            record = self._records[0]
            return record if result is None or record.id < result.id else result
        # What was spilled may come before the result.
        return None if self.spilled else result

    def take(self) -> Ticket:
        """Return the message that may go out now, and count it as under way."""
        ticket = self._next()
        assert ticket is not None
        if self._again and any(ticket is other for _, other in self._again):
            if self._again[0][1] is ticket:
                heapq.heappop(self._again)
            else:
                self._again = [(number, other) for number, other in self._again if other is not ticket]
                heapq.heapify(self._again)
        elif ticket.rank is MessageClass.RESULT:
            self._results.popleft()
        else:
            self._records.popleft()
        self._under_way[ticket.id] = ticket
        ticket.tried = True
        return ticket

    def doubtful(self, ticket: Ticket) -> bool:
        """Note that a call failed by what may be a bug of the server's; say whether the message is sent again."""
        if not self.waiting:
            # Else it is one of several that failed together.
            self._doubts += 1
        return self._doubts <= (PATIENCE if ticket.rank is MessageClass.RESULT else PATIENCE_WITH_RECORDS)

    def arrived(self) -> None:
        """Note that the server has taken a message."""
        self._doubts = 0

    def succeeded(self, ticket: Ticket) -> None:
        """Note that a message is done with, one way or the other."""
        self._under_way.pop(ticket.id, None)
        self.failures = 0
        self._window = min(WINDOW, self._window + 1)

    def failed(self, ticket: Ticket) -> bool:
        """Note that a message has to be sent again; say whether this begins a wait."""
        if self._under_way.pop(ticket.id, None) is not None:
            heapq.heappush(self._again, (ticket.id, ticket))
        self._window = 1
        if self.waiting:
            # One of several that failed together.
            return False
        self.failures += 1
        self.waiting = True
        return True
