"""Whose turn it is: lanes that may send, in the order of what they would send, and how many calls there may be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from scaleout_mp.transport.message import MessageClass

if TYPE_CHECKING:
    from collections.abc import Callable

    from scaleout_mp.transport.lane import Lane
    from scaleout_mp.transport.message import Ticket

#: Calls under way at once, over all tasks, and how many more there may be for results.
UNDER_WAY: Final = 64
RESULTS_BESIDE: Final = 8


class Turns:
    """The lanes that may send. Kept by the outbox."""

    def __init__(self, under_way: int = UNDER_WAY) -> None:
        """Allow so many calls at once."""
        self._limits = dict.fromkeys(MessageClass, under_way)
        # Results never wait until a record's call comes back.
        self._limits[MessageClass.RESULT] += RESULTS_BESIDE
        #: By what they would send; those whose turn is next come first. Checked when picked.
        self._ready: dict[MessageClass, dict[Lane, None]] = {rank: {} for rank in MessageClass}
        #: Calls under way.
        self.busy = 0

    @property
    def most(self) -> int:
        """How many calls there may be at all."""
        return self._limits[MessageClass.RESULT]

    @property
    def any(self) -> bool:
        """Whether a lane may send now."""
        return any(lanes and self.busy < self._limits[rank] for rank, lanes in self._ready.items())

    def note(self, lane: Lane) -> None:
        """Line a lane up when it has something that may go."""
        rank = lane.next_rank()
        if rank is not None:
            self._ready[rank].setdefault(lane)

    def pick(self, look: Callable[[Lane], None]) -> tuple[Lane, Ticket] | None:
        """Take the next message; `look` lines up what the lanes have then. None when nothing may go."""
        for rank, lanes in self._ready.items():
            while lanes and self.busy < self._limits[rank]:
                lane = next(iter(lanes))
                del lanes[lane]
                ticket = lane.take() if lane.next_rank() is rank else None
                # At the end: the lanes take turns.
                look(lane)
                if ticket is not None:
                    return lane, ticket
        return None
