"""What must reach the combiner: in order within a task, retried as long as the link is down."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import enum
import logging
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.errors import AuthenticationError, TransportError
from scaleout_mp.transport.calls import worth_retrying
from scaleout_mp.wire import methods

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from scaleout_mp.transport.calls import CombinerCalls

logger = logging.getLogger(__name__)

#: Records, and bytes of them, that wait at most; what comes beyond is dropped and counted.
MAX_RECORDS: Final = 1_000_000
MAX_RECORD_BYTES: Final = 256 << 20
#: Calls under way at once, over all tasks.
IN_FLIGHT: Final = 32


class MessageKind(enum.Enum):
    """What a message is, and by which call it goes."""

    METRIC = methods.SEND_MODEL_METRIC
    ATTRIBUTES = methods.SEND_ATTRIBUTE_MESSAGE
    TELEMETRY = methods.SEND_TELEMETRY_MESSAGE
    STATUS = methods.SEND_STATUS
    UPDATE = methods.SEND_MODEL_UPDATE
    VALIDATION = methods.SEND_MODEL_VALIDATION

    @property
    def bounded(self) -> bool:
        """Whether there may be so many of them that some must be dropped in a long outage."""
        return self in {MessageKind.METRIC, MessageKind.ATTRIBUTES, MessageKind.TELEMETRY}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutboxCounts:
    """How many messages went which way, since the start."""

    pending: int
    delivered: int
    #: Records that found the box full.
    dropped: int
    #: Messages that the combiner refused for good.
    refused: int


class Ticket:
    """The fate of one message."""

    __slots__ = ("_error", "_settled", "_waiter", "kind", "packed", "tried")

    def __init__(self, kind: MessageKind, packed: bytes) -> None:
        self.kind = kind
        #: As bytes: of a million messages the objects would take many times the room.
        self.packed = packed
        #: Whether it went out at least once: the combiner may have it even if no answer came.
        self.tried = False
        self._settled = False
        self._error: TransportError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def refused(self) -> bool:
        """Whether it is certain that the combiner will not have the message."""
        return self._settled and self._error is not None

    @property
    def arrived(self) -> bool:
        """Whether the combiner has the message."""
        return self._settled and self._error is None

    def settle(self, error: TransportError | None) -> None:
        """Note that the message was delivered, or that it never will be. Called by the outbox."""
        self._settled, self._error = True, error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def delivered(self) -> None:
        """Wait until the combiner has the message. Raises the TransportError with which it was refused."""
        if not self._settled:
            if self._waiter is None:
                self._waiter = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._waiter)
        if self._error is not None:
            raise self._error


class _Lane:
    """The messages of one task, in order."""

    def __init__(self) -> None:
        self.waiting: collections.deque[Ticket] = collections.deque()
        self.sender: asyncio.Task[None] | None = None


class Outbox:
    """Messages in memory until the combiner has them. Lives on one event loop."""

    def __init__(
        self,
        calls: CombinerCalls,
        *,
        max_records: int = MAX_RECORDS,
        max_record_bytes: int = MAX_RECORD_BYTES,
        in_flight: int = IN_FLIGHT,
    ) -> None:
        self._calls = calls
        self._max_records = max_records
        self._slots = asyncio.Semaphore(in_flight)
        self._lanes: dict[str, _Lane] = {}
        self._max_record_bytes = max_record_bytes
        self._records = 0
        self._record_bytes = 0
        self._pending = 0
        self._delivered = 0
        self._dropped = 0
        self._refused = 0

    @property
    def counts(self) -> OutboxCounts:
        """How many messages went which way."""
        return OutboxCounts(
            pending=self._pending, delivered=self._delivered, dropped=self._dropped, refused=self._refused
        )

    @property
    def link_down(self) -> bool:
        """Whether the last call to the combiner failed."""
        return self._calls.link.down

    def put(self, kind: MessageKind, message: Message, *, task_id: str = "") -> Ticket:
        """Take a message; those of one task arrive in the order in which they were put."""
        ticket = Ticket(kind, message.SerializeToString())
        if kind.bounded:
            size = len(ticket.packed)
            if self._records >= self._max_records or self._record_bytes + size > self._max_record_bytes:
                self._drop(ticket)
                return ticket
            self._records += 1
            self._record_bytes += size
        self._pending += 1
        lane = self._lanes.setdefault(task_id, _Lane())
        lane.waiting.append(ticket)
        if lane.sender is None:
            lane.sender = asyncio.get_running_loop().create_task(self._deliver(task_id, lane))
        return ticket

    def _drop(self, ticket: Ticket) -> None:
        if self._dropped == 0:
            logger.warning(
                "%d records wait for the combiner; further ones are dropped until it answers",
                self._records,
                extra={"action": "outbox_full"},
            )
        self._dropped += 1
        ticket.settle(TransportError("the outbox is full"))

    async def _deliver(self, task_id: str, lane: _Lane) -> None:
        failures = 0
        while lane.waiting:
            ticket = lane.waiting[0]
            error: TransportError | None = None
            try:
                # The slot is held for the attempt only: a lane that waits for the link must not block others.
                async with self._slots:
                    ticket.tried = True
                    await self._calls.once(ticket.kind.value, ticket.kind.value.request.FromString(ticket.packed))
            except TransportError as failure:
                # A refused token may be accepted again; the messages are worth the wait.
                if worth_retrying(failure) or isinstance(failure, AuthenticationError):
                    failures += 1
                    wait = self._calls.delay(failures)
                    self._calls.link.failed(ticket.kind.value.name, failure, wait)
                    await self._calls.sleep(wait)
                    continue
                error = failure
            except Exception as bug:
                # Whatever is wrong with one message, those behind it must not wait for ever.
                logger.exception("sending a message failed in the client itself", extra={"action": "outbox_bug"})
                error = TransportError(f"internal error of the client: {type(bug).__name__}: {bug}")
            failures = 0
            # Unless it was given up meanwhile.
            if lane.waiting and lane.waiting[0] is ticket:
                lane.waiting.popleft()
                self._settle(ticket, error)
        del self._lanes[task_id]

    def _settle(self, ticket: Ticket, error: TransportError | None) -> None:
        self._pending -= 1
        if ticket.kind.bounded:
            self._records -= 1
            self._record_bytes -= len(ticket.packed)
        if error is None:
            self._delivered += 1
        else:
            self._refused += 1
            logger.error("the combiner refused a message for good: %s", error, extra={"action": "message_refused"})
        ticket.settle(error)

    async def flush(self, task_id: str, within: float | None = None) -> bool:
        """Wait until nothing of the task is left to send; False when that takes over `within` seconds."""
        lane = self._lanes.get(task_id)
        if lane is None or lane.sender is None:
            return True
        done, _ = await asyncio.wait([lane.sender], timeout=within)
        return bool(done)

    def waiting(self, task_id: str) -> int:
        """Return how many messages of a task wait."""
        lane = self._lanes.get(task_id)
        return 0 if lane is None else len(lane.waiting)

    def give_up_records(self, task_id: str | None = None) -> int:
        """Drop what a task, or any, has logged and still waits; return how much. Results and statuses stay."""
        count = 0
        for lane in [lane for name, lane in self._lanes.items() if task_id is None or name == task_id]:
            kept: list[Ticket] = []
            for ticket in lane.waiting:
                if not ticket.kind.bounded:
                    kept.append(ticket)
                    continue
                count += 1
                self._pending -= 1
                self._records -= 1
                self._record_bytes -= len(ticket.packed)
                ticket.settle(TransportError("the record was given up"))
            lane.waiting.clear()
            lane.waiting.extend(kept)
        self._dropped += count
        if count:
            logger.warning("%d records were given up", count, extra={"action": "records_given_up", "task_id": task_id})
        return count

    async def drain(self, within: float) -> bool:
        """Wait until nothing is left to send, at most `within` seconds; return whether that is so."""
        deadline = asyncio.get_running_loop().time() + within
        while self._lanes:
            left = deadline - asyncio.get_running_loop().time()
            senders = self._senders()
            if left <= 0 or not senders:
                return False
            await asyncio.wait(senders, timeout=left)
        return True

    async def aclose(self) -> None:
        """Stop sending; what is left is lost, and said so."""
        senders = self._senders()
        for sender in senders:
            sender.cancel()
        if senders:
            await asyncio.wait(senders)
        if self._pending:
            logger.warning("%d messages did not reach the combiner", self._pending, extra={"action": "outbox_lost"})
        for lane in self._lanes.values():
            for ticket in lane.waiting:
                ticket.settle(TransportError("the client ended before the message could be sent"))
        self._lanes.clear()

    def _senders(self) -> list[asyncio.Task[Any]]:
        return [lane.sender for lane in self._lanes.values() if lane.sender is not None]
