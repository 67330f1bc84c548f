"""What must outlive the client, in SQLite: written in batches by a thread of its own.

The loop never waits for the disk. What it hands over within a few milliseconds becomes one transaction, in the order in
which it was handed over. A killed process loses at most what those milliseconds brought; what is vital is also safe
from a loss of power once `synced` says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import queue
import sqlite3
import threading
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.errors import StateError
from scaleout_mp.transport.journal_file import JournalFile, Write

if TYPE_CHECKING:
    from collections.abc import Callable

    from scaleout_mp.transport.message import Ticket

logger = logging.getLogger(__name__)

#: Seconds within which what comes is one transaction.
_GATHER: Final = 0.005
#: Writes that are handed over at once.
_FULL_BATCH: Final = 2_000
#: Seconds after which what could not be written is tried again.
_RETRY: Final = 2.0


@dataclasses.dataclass(slots=True)
class _Read:
    statement: str
    row: tuple[Any, ...]
    then: Callable[[list[Any]], None]


@dataclasses.dataclass(slots=True)
class _Sync:
    reached: asyncio.Future[bool]


_Order = Write | _Read | _Sync


class Journal:
    """One SQLite file. Every method is called on the loop on which it was opened."""

    def __init__(self, path: str) -> None:
        self.path = path
        #: Called with the messages that the disk did not take and that were not vital.
        self.on_lost: Callable[[list[Ticket]], None] = _ignore
        self._loop = asyncio.get_running_loop()
        self._waiting: list[_Order] = []
        self._timer: asyncio.Handle | None = None
        self._orders: queue.SimpleQueue[list[_Order] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._file = JournalFile(path)

    @property
    def damaged(self) -> bool:
        """Whether the file was damaged when it was opened, and something of it may be missing."""
        return self._file.damaged

    async def open(self) -> None:
        """Open the file, made when it is missing. Raises StateError when it cannot be used.

        A damaged file is put aside, what can be read of it is taken over, and both is said.
        """
        opened: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(
            target=self._work, args=(self._file, opened), name="scaleout_mp journal", daemon=True
        )
        self._thread.start()
        try:
            await opened
        except sqlite3.Error as error:
            raise StateError(f"{self.path} cannot be used: {error}") from error

    def write(self, statement: str, row: tuple[Any, ...], *, vital: bool = True, ticket: Ticket | None = None) -> None:
        """Have a statement executed, soon and in order."""
        self._order(Write(statement, row, vital, ticket), at_once=vital)

    def read(self, statement: str, row: tuple[Any, ...], then: Callable[[list[Any]], None]) -> None:
        """Have `then` called on the loop with the rows, which know all that was written before."""
        self._order(_Read(statement, row, then), at_once=True)

    async def rows(self, statement: str, row: tuple[Any, ...] = ()) -> list[Any]:
        """Return the rows, which know all that was written before."""
        found: asyncio.Future[list[Any]] = self._loop.create_future()
        self.read(statement, row, lambda rows: None if found.done() else found.set_result(rows))
        return await found

    async def synced(self) -> bool:
        """Wait until all vital writes so far are on the disk, safe from a loss of power.

        False, after one attempt, when the disk did not take them.
        """
        reached: asyncio.Future[bool] = self._loop.create_future()
        self._order(_Sync(reached), at_once=True)
        return await reached

    async def aclose(self) -> None:
        """Write what is left and close the file. Safe to call again."""
        if self._closed or self._thread is None:
            return
        self._closed = True
        self._hand_over()
        self._orders.put(None)
        await asyncio.to_thread(self._thread.join)

    def _order(self, order: _Order, *, at_once: bool) -> None:
        if self._closed:
            raise RuntimeError("the journal is closed")
        self._waiting.append(order)
        if len(self._waiting) >= _FULL_BATCH:
            self._hand_over()
        elif self._timer is None:
            self._timer = self._loop.call_later(0 if at_once else _GATHER, self._hand_over)
        elif at_once:
            self._timer.cancel()
            self._timer = self._loop.call_soon(self._hand_over)

    def _hand_over(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting:
            self._orders.put(self._waiting)
            self._waiting = []

    # On the thread

    def _work(self, writer: JournalFile, opened: asyncio.Future[None]) -> None:
        try:
            writer.open()
        except Exception as error:  # noqa: BLE001 - whoever waits must not wait for ever
            writer.close()
            self._call(_fail, opened, error)
            return
        self._call(opened.set_result, None)
        try:
            while self._next_batch(writer):
                pass
        finally:
            writer.close()

    def _next_batch(self, writer: JournalFile) -> bool:
        """Wait for orders and do them; False when there will be no more."""
        try:
            batch = self._orders.get(timeout=_RETRY if writer.held_back else None)
        except queue.Empty:
            batch = []
        if batch is None:
            self._apply(writer, [], sync=True)
            return False
        self._obey(writer, batch)
        return True

    def _obey(self, writer: JournalFile, batch: list[_Order]) -> None:
        """Do a batch: runs of writes as one transaction each, and what stands between them."""
        writes: list[Write] = []
        for order in batch:
            if isinstance(order, Write):
                writes.append(order)
                continue
            stored = self._apply(writer, writes, sync=isinstance(order, _Sync))
            writes = []
            if isinstance(order, _Sync):
                self._call(_reach, order.reached, stored)
            else:
                self._call(order.then, writer.rows(order.statement, order.row))
        if writes or not batch:
            self._apply(writer, writes, sync=False)

    def _apply(self, writer: JournalFile, writes: list[Write], *, sync: bool) -> bool:
        if not writes and not writer.held_back:
            return True
        try:
            lost = writer.apply(writes, sync=sync or any(write.vital for write in writes))
        except Exception:
            # A statement of ours is wrong: those who wait for the rest must not wait for ever.
            logger.exception("writing %s failed in the client itself", self.path, extra={"action": "journal_bug"})
            return False
        if lost:
            self._call(self.on_lost, lost)
        return not writer.held_back

    def _call(self, function: Callable[..., object], *args: Any) -> None:
        # The loop is closed when its program was torn down without closing the journal.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _reach(future: asyncio.Future[bool], stored: bool) -> None:
    if not future.done():
        future.set_result(stored)


def _ignore(_lost: list[Ticket]) -> None:
    """Do nothing."""
