"""How long a transfer may get nowhere: nothing else finds a server that is there and hangs."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from typing import TYPE_CHECKING

from scaleout_mp.errors import CallError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patience:
    """Seconds after which a transfer that gets nowhere is begun anew."""

    #: Until the next message of a download comes.
    download: float = 60.0
    #: Until the next message of an upload is taken. Long, because over a slow link all of it would have to go again.
    upload: float = 180.0
    #: Until an upload is answered of which all was taken: what is in buffers still has to arrive, and to be stored.
    answer: float = 600.0
    #: For each GB of the model on top.
    answer_per_gb: float = 100.0

    def for_answer(self, size: int) -> float:
        """Return the seconds until the answer to an upload of that many bytes."""
        return self.answer + self.answer_per_gb * size / 1e9


class Stall:
    """A deadline that moves on with a transfer."""

    def __init__(self, timeout: asyncio.Timeout, within: float, what: str) -> None:
        self._timeout = timeout
        self.within = within
        self.what = what

    def moved(self, within: float, what: str) -> None:
        """Note that the transfer got somewhere; it has to again within so many seconds, else `what` is said of it."""
        self.within, self.what = within, what
        # gRPC reads what is to be sent in a task of its own, which may be late: the call is over then.
        with contextlib.suppress(RuntimeError):
            self._timeout.reschedule(asyncio.get_running_loop().time() + within)


@contextlib.asynccontextmanager
async def stalling(call: str, within: float, what: str) -> AsyncIterator[Stall]:
    """End what is awaited inside with a CallError, worth another try, when it gets nowhere for so many seconds."""
    try:
        async with asyncio.timeout(within) as timeout:
            stall = Stall(timeout, within, what)
            yield stall
    except TimeoutError as error:
        raise CallError(
            f"{call}: {stall.what} for {stall.within:.0f} s", call=call, code="DEADLINE_EXCEEDED", transient=True
        ) from error
