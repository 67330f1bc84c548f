"""The supervisor's end of a task's ring: when to look into it, and what comes out."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from scaleout_mp.errors import ProtocolViolation
from scaleout_mp.ipc.channel import close_all
from scaleout_mp.ipc.frames import Frame, FrameDecoder, Kind
from scaleout_mp.ipc.messages import RECORD_KINDS
from scaleout_mp.ipc.ring import CAPACITY, RingReader

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

#: Bytes that are read in one turn of the loop: others wait for theirs.
_AT_ONCE: Final = 1 << 14
#: Seconds between two looks while records come; they grow longer while none do.
_OFTEN: Final = 0.01
_SELDOM: Final = 0.05
#: Seconds after the last record until nobody looks any more: then a task has to ring.
_ATTENTIVE: Final = 1.0
#: Seconds beyond a promised moment: more than two processors' stores can be apart.
_MARGIN: Final = 0.001


class RingInbox:
    """Where the records of one task arrive, once it has a ring. Lives on the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_records: Callable[[], None]) -> None:
        """Call `on_records` when it is time to `read`."""
        self._loop = loop
        self._on_records = on_records
        self._ring: RingReader | None = None
        self._decoder = FrameDecoder()
        self._look: asyncio.Handle | None = None
        #: Until when the task is promised a look, by the clock that it has as well; the loop's may be another.
        self._until = 0.0
        self._pause = _OFTEN

    @property
    def opened(self) -> bool:
        """Whether the task has a ring."""
        return self._ring is not None

    def takes(self, frame: Frame) -> bool:
        """Take a frame that is about the ring itself. Raises ProtocolViolation."""
        if frame.kind is Kind.RING:
            self._open(frame)
            return True
        if frame.kind is Kind.BELL:
            close_all(frame.descriptors)
            self._on_bell()
            return True
        return False

    def _open(self, frame: Frame) -> None:
        if self._ring is not None or len(frame.descriptors) != 1 or frame.fields:
            close_all(frame.descriptors)
            raise ProtocolViolation("a RING frame came twice, or without its memory")
        try:
            self._ring = RingReader(frame.descriptors[0])
        except OSError as error:
            raise ProtocolViolation(f"the memory for records cannot be mapped: {error}") from error
        # An abort may have come before the ring was there to tell of it.
        self._ring.tell_of_mail()

    def _on_bell(self) -> None:
        if self._ring is None:
            return
        self._ring.heard_bell()
        # A second look: the first may come before the other processor's last store.
        self._until = max(self._until, time.monotonic() + _MARGIN)
        if self._look is not None:
            self._look.cancel()
        self._look = self._loop.call_soon(self._on_look)

    def _on_look(self) -> None:
        self._look = None
        ring = self._ring
        if ring is None:
            return
        # Before the look: what is written after a moment that was promised has to ring.
        now = time.monotonic()
        if ring.filled:
            self._pause = _OFTEN
            self._until = now + _ATTENTIVE
            ring.look_until(self._until)
            self._on_records()
        else:
            self._pause = min(_SELDOM, 2 * self._pause)
        if self._ring is not ring:
            # What was read closed it.
            return
        if ring.filled:
            self._look = self._loop.call_soon(self._on_look)
        elif now < self._until + _MARGIN:
            self._look = self._loop.call_later(self._pause, self._on_look)

    def read(self, most: int = _AT_ONCE) -> list[Frame]:
        """Return the records that have come, those in the first `most` bytes. Raises ProtocolViolation."""
        if self._ring is None:
            return []
        data = self._ring.read(most)
        if not data:
            return []
        frames = []
        for kind, descriptors, fields in self._decoder.feed(data):
            if kind not in RECORD_KINDS or descriptors:
                raise ProtocolViolation(f"a {kind.name} frame came where records come")
            frames.append(Frame(kind, fields, []))
        return frames

    def read_all(self) -> list[Frame]:
        """Return all records that have come by now. Raises ProtocolViolation."""
        return self.read(CAPACITY)

    def tell_of_mail(self) -> None:
        """Have the task look into its socket."""
        if self._ring is not None:
            self._ring.tell_of_mail()

    def close(self) -> None:
        """Look no more."""
        if self._look is not None:
            self._look.cancel()
            self._look = None
        ring, self._ring = self._ring, None
        if ring is not None:
            ring.tell_of_mail()
            ring.close()
