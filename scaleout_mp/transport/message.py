"""One message to the combiner: what it is, how much it matters, and what becomes of it."""

from __future__ import annotations

import asyncio
import enum
from typing import TYPE_CHECKING

from scaleout_mp.wire import methods

if TYPE_CHECKING:
    from scaleout_mp.errors import TransportError


class MessageClass(enum.IntEnum):
    """What goes first, and what may be dropped: the lowest number is the most important."""

    #: Results and statuses. Never dropped.
    RESULT = 0
    METRIC = 1
    TELEMETRY = 2


class MessageKind(enum.Enum):
    """What a message is, and by which call it goes; `Sender` knows what goes by a stream where there is one."""

    METRIC = methods.SEND_MODEL_METRIC
    ATTRIBUTES = methods.SEND_ATTRIBUTE_MESSAGE
    TELEMETRY = methods.SEND_TELEMETRY_MESSAGE
    STATUS = methods.SEND_STATUS
    UPDATE = methods.SEND_MODEL_UPDATE
    VALIDATION = methods.SEND_MODEL_VALIDATION
    #: Streamed, or not sent at all.
    INFERENCE_RESULT = methods.STREAM_INFERENCE_RESULT

    @property
    def message_class(self) -> MessageClass:
        """How much messages of this kind matter."""
        return _CLASSES.get(self, MessageClass.RESULT)


_CLASSES = {
    MessageKind.METRIC: MessageClass.METRIC,
    MessageKind.ATTRIBUTES: MessageClass.METRIC,
    MessageKind.TELEMETRY: MessageClass.TELEMETRY,
    MessageKind.INFERENCE_RESULT: MessageClass.METRIC,
}


class Ticket:
    """The fate of one message. Made and settled by the outbox, on its loop."""

    __slots__ = ("_error", "_settled", "_waiter", "id", "kind", "lane", "packed", "rank", "spilled", "stored", "tried")

    def __init__(self, number: int, lane: str, kind: MessageKind, packed: bytes, *, stored: bool = False) -> None:
        """`stored`: the message comes from the journal, where an earlier run of the client left it."""
        #: Grows from message to message, over all runs of the client.
        self.id = number
        #: The task that sent it; empty for none.
        self.lane = lane
        self.kind = kind
        self.rank = kind.message_class
        #: As bytes: of many messages the objects would take many times the room. Sent as they are, each time.
        self.packed = packed
        #: Whether the journal has it, or is about to. Set by the journal's thread.
        self.stored = stored
        #: Whether it is in the journal alone.
        self.spilled = False
        #: Whether it went out at least once: the combiner may have it even if no answer came.
        self.tried = stored
        self._settled = False
        self._error: TransportError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def made_at(self) -> float:
        """Seconds since the epoch at which it was made, as it says itself."""
        timestamp = self.kind.value.request.FromString(self.packed).timestamp  # type: ignore[attr-defined]  # all have it
        seconds: float = timestamp.seconds + timestamp.nanos / 1e9
        return seconds

    @property
    def settled(self) -> bool:
        """Whether the outbox is done with it."""
        return self._settled

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
        self._error = error
        # Last: the journal's thread looks at it.
        self._settled = True
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
