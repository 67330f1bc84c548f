"""What must reach the combiner: kept in the journal, sent in order within a task, retried as long as the link is down.

A message that arrives before the journal writes it, within a few milliseconds, is never written. At least once: what
was under way when the client died is sent again, byte for byte.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from scaleout_mp.errors import AuthenticationError, CallError, TransportError
from scaleout_mp.transport.backoff import Backoff
from scaleout_mp.transport.calls import may_pass, worth_retrying
from scaleout_mp.transport.lane import HELD, PAGE, Lane, Pace
from scaleout_mp.transport.message import MessageClass, MessageKind, Ticket
from scaleout_mp.transport.message_table import MessageTable
from scaleout_mp.transport.sending import Sender
from scaleout_mp.transport.stock import BOUNDS, Bound, Stock
from scaleout_mp.transport.tally import OutboxCounts, Refusals, Tally
from scaleout_mp.transport.turns import UNDER_WAY, Turns

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Mapping

    from google.protobuf.message import Message

    from scaleout_mp.transport.calls import CombinerCalls
    from scaleout_mp.transport.journal import Journal

logger = logging.getLogger(__name__)


#: A call that fails by itself is soon made again; a link that is down gets one call of each task now and then.
RETRIES: Final = Backoff(first=0.05, cap=5.0)


class Outbox:
    """Messages until the combiner has them. Lives on one event loop."""

    def __init__(
        self,
        calls: CombinerCalls,
        journal: Journal | None = None,
        *,
        bounds: Mapping[MessageClass, Bound] = BOUNDS,
        under_way: int = UNDER_WAY,
        retries: Backoff = RETRIES,
        pace: Pace | None = None,
        on_refused: Callable[[Ticket, TransportError], None] | None = None,
    ) -> None:
        """Keep messages in `journal`, which is open; without one, in memory alone.

        `on_refused` is called with a message that will never be taken, before that is forgotten.
        """
        self._calls = calls
        self._sender = Sender(calls)
        self._table = None if journal is None else MessageTable(journal)
        self._bounds = bounds
        self._retries = retries
        self._on_refused = on_refused
        self._turns = Turns(under_way)
        self._lanes: dict[str, Lane] = {}
        self._senders: set[asyncio.Task[None]] = set()
        self._waits: set[asyncio.TimerHandle] = set()
        self._stock = Stock()
        self._pace = pace or Pace()
        self._tally = Tally()
        self._last_id = 0
        self._refusals = Refusals()
        self._results_only = self._closed = False
        if journal is not None:
            journal.on_lost = self._on_lost

    async def load(self) -> int:
        """Take over what an earlier run of the client left in the journal; return how many messages that is."""
        if self._table is None:
            return 0
        for left in await self._table.left_records():
            lane = self._lane(left.lane)
            lane.spilled += left.count
            lane.stock.add(left.rank, left.count, left.bytes)
            self._stock.add(left.rank, left.count, left.bytes)
            self._tally.pending += left.count
            self._last_id = max(self._last_id, left.last_id)
        for ticket in await self._table.left_results():
            self._lane(ticket.lane).append(ticket)
            self._tally.pending += 1
            self._last_id = max(self._last_id, ticket.id)
        for lane in self._lanes.values():
            self._touch(lane)
        self._pump()
        return self._tally.pending

    @property
    def counts(self) -> OutboxCounts:
        """How many messages went which way."""
        return self._tally.counts

    def oldest_age(self, now: float) -> float | None:
        """Return how many seconds ago the oldest message that waits was made, by the wall clock; None without one."""
        oldest = [lane.oldest() for lane in self._lanes.values()]
        made = [ticket.made_at for ticket in oldest if ticket is not None]
        return max(0.0, now - min(made)) if made else None

    @property
    def link_down(self) -> bool:
        """Whether the last call to the combiner failed."""
        return self._calls.link.down

    # Messages come

    def put(self, kind: MessageKind, message: Message, *, task_id: str = "") -> Ticket:
        """Take a message; those of one task arrive in the order in which they were put."""
        self._last_id += 1
        ticket = Ticket(self._last_id, task_id, kind, message.SerializeToString())
        if self._closed:
            self._drop([ticket], "the client has ended")
            return ticket
        rank, size = ticket.rank, len(ticket.packed)
        if not self._stock.has_room(rank, size, self._bounds.get(rank)):
            self._turn_away(ticket)
            return ticket
        self._stock.add(rank, 1, size)
        self._tally.pending += 1
        lane = self._lane(task_id)
        lane.append(ticket)
        lane.stock.add(rank, 1, size)
        if self._table is not None:
            self._table.add(ticket)
        self._touch(lane)
        self._pump()
        return ticket

    def _lane(self, name: str) -> Lane:
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = Lane(name, self._pace, held=None if self._table is None else HELD)
            if self._results_only:
                lane.send_results_only()
        return lane

    def _turn_away(self, ticket: Ticket) -> None:
        if not self._tally.dropped:
            logger.warning(
                "%d records wait for the combiner; further ones are dropped until it answers",
                self._stock.total,
                extra={"action": "outbox_full"},
            )
        self._drop([ticket], "the outbox is full")

    def _drop(self, tickets: Iterable[Ticket], why: str) -> None:
        for ticket in tickets:
            self._tally.drop(ticket.lane)
            ticket.settle(TransportError(why))

    def take_dropped(self, task_id: str) -> int:
        """Return how many records of a task were dropped, and forget it."""
        return self._tally.take_dropped(task_id)

    # Messages go

    def _touch(self, lane: Lane) -> None:
        """Have a lane looked at, after whatever changed in it."""
        if lane.wants_page and self._table is not None:
            lane.fetching, epoch = True, lane.epoch
            self._table.fetch(lane.name, lane.read_to, PAGE, lambda found: self._on_page(lane, epoch, found))
        self._turns.note(lane)

    def _on_page(self, lane: Lane, epoch: int, found: list[Ticket]) -> None:
        if epoch != lane.epoch or self._closed:
            return
        lane.fetched(found)
        if lane.spilled and not found:
            logger.error("%d records are missing in the journal", lane.spilled, extra={"action": "records_missing"})
            self._forget_spilled(lane, lane.spilled, Stock.of(lane.unsettled()))
        self._touch(lane)
        self._pump()
        self._retire(lane)

    def _forget_spilled(self, lane: Lane, count: int, left: Stock) -> None:
        """Count records out that are in the journal alone, and will not be sent; `left` stays in the lane."""
        self._stock.subtract(lane.stock)
        self._stock.add_all(left)
        lane.stock = left
        lane.spilled -= count
        self._tally.pending -= count
        self._tally.drop(lane.name, count)

    def _pump(self) -> None:
        """Start another sender when there is something for it to send."""
        if self._closed or len(self._senders) >= self._turns.most:
            return
        if self._turns.any:
            sender = asyncio.get_running_loop().create_task(self._send())
            self._senders.add(sender)
            sender.add_done_callback(self._senders.discard)

    async def _send(self) -> None:
        while (found := self._turns.pick(self._touch)) is not None:
            lane, ticket = found
            self._turns.busy += 1
            try:
                self._pump()
                await self._attempt(lane, ticket)
            finally:
                self._turns.busy -= 1
            self._touch(lane)

    async def _attempt(self, lane: Lane, ticket: Ticket) -> None:
        error: TransportError | None = None
        begun = asyncio.get_running_loop().time()
        try:
            await self._sender.send(ticket)
            self._pace.measured(asyncio.get_running_loop().time() - begun)
            lane.arrived()
        except TransportError as failure:
            # A refused token may be accepted again; the messages are worth the wait.
            waits = worth_retrying(failure) or isinstance(failure, AuthenticationError)
            if waits or (may_pass(failure) and lane.doubtful(ticket)):
                self._on_failure(lane, ticket, failure)
                return
            error = failure
        except Exception as bug:
            # Whatever is wrong with one message, those behind it must not wait for ever.
            logger.exception("sending a message failed in the client itself", extra={"action": "outbox_bug"})
            error = TransportError(f"internal error of the client: {type(bug).__name__}: {bug}")
        lane.succeeded(ticket)
        # Unless it was given up meanwhile.
        if not ticket.settled:
            self._settle(lane, ticket, error)
        self._retire(lane)

    def _on_failure(self, lane: Lane, ticket: Ticket, failure: TransportError) -> None:
        if not lane.failed(ticket):
            return
        wait = self._retries.delay(lane.failures)
        if may_pass(failure):
            # It was answered: the link is not to blame.
            logger.warning("%s; trying again in %.1f s", failure, wait, extra={"action": "message_doubtful"})
        else:
            self._calls.link.failed(ticket.kind.value.name, failure, wait)
        loop = asyncio.get_running_loop()

        def go_on() -> None:
            self._waits.discard(handle)
            lane.waiting = False
            self._touch(lane)
            self._pump()

        handle = loop.call_later(wait, go_on)
        self._waits.add(handle)

    def _settle(self, lane: Lane, ticket: Ticket, error: TransportError | None) -> None:
        if error is None:
            self._tally.delivered += 1
            self._refusals.taken(ticket)
        elif isinstance(error, CallError) and error.code == "UNIMPLEMENTED" and ticket.rank is not MessageClass.RESULT:
            self._refusals.unknown(ticket)
            self._tally.drop(ticket.lane)
        else:
            self._tally.refused += 1
            self._refusals.refused(ticket, error)
            if self._on_refused is not None:
                self._on_refused(ticket, error)
        self._discount(lane, ticket)
        ticket.settle(error)
        if self._table is not None:
            self._table.remove(ticket)

    def _discount(self, lane: Lane, ticket: Ticket) -> None:
        self._tally.pending -= 1
        lane.stock.add(ticket.rank, -1, -len(ticket.packed))
        self._stock.add(ticket.rank, -1, -len(ticket.packed))

    def _retire(self, lane: Lane) -> None:
        """Tell who waits for a lane that it is finished; one that is empty is forgotten."""
        if lane.finished:
            lane.done.set()
            # Not one that took the name since.
            if not lane.pending and self._lanes.get(lane.name) is lane:
                del self._lanes[lane.name]

    def _on_lost(self, tickets: list[Ticket]) -> None:
        """Count what the disk did not take and memory has not; the rest is sent all the same."""
        for ticket in tickets:
            lane = self._lanes.get(ticket.lane)
            # Given up meanwhile, when there is no such lane.
            if ticket.spilled and not ticket.settled and lane is not None and lane.spilled:
                lane.spilled -= 1
                self._discount(lane, ticket)
                self._drop([ticket], "the disk is full")
                self._touch(lane)
                self._retire(lane)
        self._pump()

    # Waiting, giving up, ending

    async def flush(self, task_id: str) -> None:
        """Wait until nothing of the task is left to send."""
        lane = self._lanes.get(task_id)
        if lane is not None and not lane.finished:
            await lane.done.wait()

    def find(self, task_id: str, kinds: Container[MessageKind]) -> Ticket | None:
        """Return the first result or status of a task that waits and is of one of the kinds."""
        lane = self._lanes.get(task_id)
        tickets = () if lane is None else lane.unsettled()
        return next((ticket for ticket in tickets if ticket.kind in kinds), None)

    def waiting(self, task_id: str) -> int:
        """Return how many messages of a task wait."""
        lane = self._lanes.get(task_id)
        return 0 if lane is None else lane.pending

    def give_up_records(self, task_id: str | None = None) -> int:
        """Drop what a task, or any, has logged and still waits; return how much. Results and statuses stay."""
        before = self._tally.dropped
        for lane in [lane for name, lane in self._lanes.items() if task_id is None or name == task_id]:
            spilled = lane.spilled
            taken = lane.remove_records()
            for ticket in taken:
                self._discount(lane, ticket)
            self._drop(taken, "the record was given up")
            lane.spilled = spilled
            self._forget_spilled(lane, spilled, Stock())
            if self._table is not None:
                self._table.remove_records(lane.name)
            self._touch(lane)
            self._retire(lane)
        self._pump()
        count = self._tally.dropped - before
        if count:
            logger.warning("%d records were given up", count, extra={"action": "records_given_up", "task_id": task_id})
        return count

    def set_records_aside(self) -> None:
        """Send results and statuses alone from now on.

        Records stay in the journal for the next start; without one they are given up.
        """
        if self._table is None:
            self.give_up_records()
            return
        self._results_only = True
        for lane in list(self._lanes.values()):
            lane.send_results_only()
            self._touch(lane)
            self._retire(lane)
        self._pump()

    async def drain(self, within: float) -> bool:
        """Wait until nothing is left to send, at most `within` seconds; return whether that is so."""
        try:
            async with asyncio.timeout(within):
                while open_lanes := [lane for lane in self._lanes.values() if not lane.finished]:
                    await open_lanes[0].done.wait()
        except TimeoutError:
            return False
        return True

    async def aclose(self) -> None:
        """Stop sending; what is left waits in the journal, or is lost without one, and said so."""
        self._closed = True
        for wait in self._waits:
            wait.cancel()
        senders = list(self._senders)
        for sender in senders:
            sender.cancel()
        if senders:
            await asyncio.wait(senders)
        await self._sender.aclose()
        if self._tally.pending and self._table is None:
            logger.warning(
                "%d messages did not reach the combiner", self._tally.pending, extra={"action": "outbox_lost"}
            )
        elif self._tally.pending and self._table is not None:
            logger.warning(
                "%d messages wait for the combiner in %s; the next start sends them",
                self._tally.pending,
                self._table.path,
                extra={"action": "outbox_kept"},
            )
        for lane in self._lanes.values():
            for ticket in lane.unsettled():
                ticket.settle(TransportError("the client ended before the message could be sent"))
        self._lanes.clear()
