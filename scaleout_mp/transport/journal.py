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
import os
import queue
import sqlite3
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.errors import StateError
from scaleout_mp.transport.reserve import Reserve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from scaleout_mp.transport.message import Ticket

logger = logging.getLogger(__name__)

#: Seconds within which what comes is one transaction.
_GATHER: Final = 0.005
#: Writes that are handed over at once.
_FULL_BATCH: Final = 2_000
#: Seconds after which what could not be written is tried again.
_RETRY: Final = 2.0
#: Seconds in which a disk that is full now and then is one warning.
_QUIET: Final = 300.0
#: Seconds to wait for somebody else who has the file open.
_BUSY: Final = 5.0
#: Pages of 4 KiB after which the log is brought into the file: well below what `reserve` holds back.
_LOG_PAGES: Final = 256
#: Of the file's layout.
_VERSION: Final = 1

_LAYOUT: Final = """
-- Results and statuses: few, and all held in memory as well.
CREATE TABLE IF NOT EXISTS results(
    id INTEGER PRIMARY KEY, lane TEXT NOT NULL, kind TEXT NOT NULL, packed BLOB NOT NULL
);
-- Clustered by lane, for they are read back lane by lane.
CREATE TABLE IF NOT EXISTS records(
    lane TEXT NOT NULL, id INTEGER NOT NULL, kind TEXT NOT NULL, packed BLOB NOT NULL, PRIMARY KEY(lane, id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tasks(
    correlation_id TEXT PRIMARY KEY, number INTEGER NOT NULL, state TEXT NOT NULL, request BLOB NOT NULL,
    status TEXT NOT NULL DEFAULT '', response TEXT NOT NULL DEFAULT '', result TEXT NOT NULL DEFAULT '', error TEXT
);
"""
#: What each table must have.
_COLUMNS: Final = {
    "results": {"id", "lane", "kind", "packed"},
    "records": {"lane", "id", "kind", "packed"},
    "tasks": {"correlation_id", "number", "state", "request", "status", "response", "result", "error"},
}


@dataclasses.dataclass(slots=True)
class _Write:
    statement: str
    row: tuple[Any, ...]
    #: To be on the disk soon and for sure.
    vital: bool
    #: The message that is stored; not needed any more once that is settled.
    ticket: Ticket | None = None

    @property
    def may_be_lost(self) -> bool:
        """Whether it is given up when the disk is full. All else is tried again for as long as it takes."""
        return self.ticket is not None and not self.vital


@dataclasses.dataclass(slots=True)
class _Read:
    statement: str
    row: tuple[Any, ...]
    then: Callable[[list[Any]], None]


@dataclasses.dataclass(slots=True)
class _Sync:
    reached: asyncio.Future[bool]


_Order = _Write | _Read | _Sync


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

    async def open(self) -> None:
        """Open the file, made when it is missing. Raises StateError when it cannot be used.

        A damaged file is put aside, and said so.
        """
        opened: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(
            target=self._work, args=(_Writer(self.path), opened), name="scaleout_mp journal", daemon=True
        )
        self._thread.start()
        try:
            await opened
        except sqlite3.Error as error:
            raise StateError(f"{self.path} cannot be used: {error}") from error

    def write(self, statement: str, row: tuple[Any, ...], *, vital: bool = True, ticket: Ticket | None = None) -> None:
        """Have a statement executed, soon and in order."""
        self._order(_Write(statement, row, vital, ticket), at_once=vital)

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

    def _work(self, writer: _Writer, opened: asyncio.Future[None]) -> None:
        try:
            writer.open()
        except sqlite3.Error as error:
            writer.close()
            self._call(_fail, opened, error)
            return
        self._call(opened.set_result, None)
        try:
            while self._next_batch(writer):
                pass
        finally:
            writer.close()

    def _next_batch(self, writer: _Writer) -> bool:
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

    def _obey(self, writer: _Writer, batch: list[_Order]) -> None:
        """Do a batch: runs of writes as one transaction each, and what stands between them."""
        writes: list[_Write] = []
        for order in batch:
            if isinstance(order, _Write):
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

    def _apply(self, writer: _Writer, writes: list[_Write], *, sync: bool) -> bool:
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


class _Writer:
    """The file, as the thread sees it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: sqlite3.Connection | None = None
        self._synchronous = "NORMAL"
        #: Writes that the disk has not taken yet, and that are not given up.
        self.held_back: list[_Write] = []
        self._failing = False
        self._warned_at = -_QUIET
        self._reserve = Reserve(f"{path}-reserve")

    def open(self) -> None:
        """Open the file; a damaged one is put aside."""
        self._open_or_replace()
        self._reserve.take()

    def _open_or_replace(self) -> None:
        try:
            self._open()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            self.close()
            aside = f"{self._path}.damaged"
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(self._path + suffix, aside + suffix)
            logger.error(  # noqa: TRY400 - the line says it all
                "%s is damaged (%s): what waited in it for the server is put aside as %s",
                self._path,
                error,
                aside,
                extra={"action": "journal_damaged"},
            )
            self._open()

    def _open(self) -> None:
        # Autocommit: transactions are begun and ended here, by name.
        self._file = sqlite3.connect(self._path, timeout=_BUSY, isolation_level=None)
        execute = self._file.execute
        (version,) = execute("PRAGMA user_version").fetchone()
        if version not in {0, _VERSION}:
            raise sqlite3.OperationalError(f"it was written by a newer version of this package ({version})")
        if version == 0:
            # What writes only once: a disk that is full must not keep out who would make room on it.
            execute("PRAGMA auto_vacuum=INCREMENTAL")
        execute("PRAGMA journal_mode=WAL")
        execute("PRAGMA synchronous=NORMAL")
        execute("PRAGMA journal_size_limit=16777216")
        execute(f"PRAGMA wal_autocheckpoint={_LOG_PAGES}")
        if version == 0:
            self._file.executescript(f"BEGIN IMMEDIATE;{_LAYOUT}PRAGMA user_version={_VERSION};COMMIT;")
        for table, columns in _COLUMNS.items():
            if {name for _, name, *_ in execute(f"PRAGMA table_info({table})")} != columns:
                raise sqlite3.DatabaseError(f"its table {table} is another program's")
        execute("SELECT count(*) FROM results").fetchone()

    def apply(self, writes: list[_Write], *, sync: bool) -> list[Ticket]:
        """Execute the writes in one transaction; return the messages that are lost because the disk refused."""
        writes = self.held_back + writes
        lost: list[Ticket] = []
        if self._reserve.given:
            # The room that is left is for what matters.
            writes, lost = _parted(writes)
        try:
            self._transact(writes, sync=sync)
        except sqlite3.Error as error:
            return lost + self._rescue(writes, error)
        if lost:
            self.held_back = []
            return lost
        held_back, self.held_back = self.held_back, []
        # A small write may find room on a disk that is full.
        if self._failing and (held_back or any(write.may_be_lost for write in writes)):
            self._failing = False
            logger.info("%s can be written again", self._path, extra={"action": "journal_recovered"})
        return []

    def _rescue(self, writes: list[_Write], error: sqlite3.Error) -> list[Ticket]:
        """Write what is vital without the rest, or hold it back until the disk takes it."""
        if not self._failing:
            self._failing = True
            again = time.monotonic() < self._warned_at + _QUIET
            self._warned_at = time.monotonic()
            logger.log(
                logging.DEBUG if again else logging.WARNING,
                "%s cannot be written: %s; metrics and telemetry that find no room in memory are dropped, "
                "and a crash now would lose what waits for the server",
                self._path,
                error,
                extra={"action": "journal_failing"},
            )
        kept, lost = _parted(writes)
        if self._reserve.give():
            self._bring_in_log()
        try:
            self._transact(kept, sync=True)
            self.held_back = []
        except sqlite3.Error:
            self.held_back = kept
        return lost

    def _bring_in_log(self) -> None:
        """Have the log give back its room."""
        assert self._file is not None
        with contextlib.suppress(sqlite3.Error):
            self._file.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _transact(self, writes: Iterable[_Write], *, sync: bool) -> None:
        file = self._file
        assert file is not None
        synchronous = "FULL" if sync else "NORMAL"
        if synchronous != self._synchronous:
            file.execute(f"PRAGMA synchronous={synchronous}")
            self._synchronous = synchronous
        file.execute("BEGIN IMMEDIATE")
        try:
            for write in writes:
                ticket = write.ticket
                if ticket is not None:
                    # In this order: the loop settles first and looks at `stored` then, so one of both sees the other.
                    ticket.stored = True
                    if ticket.settled:
                        continue
                file.execute(write.statement, write.row)
            file.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                file.execute("ROLLBACK")
            raise

    def rows(self, statement: str, row: Sequence[Any]) -> list[Any]:
        """Return the rows; none, said in the log, when they cannot be read."""
        assert self._file is not None
        try:
            return self._file.execute(statement, row).fetchall()
        except sqlite3.Error:
            logger.exception("%s cannot be read", self._path, extra={"action": "journal_unreadable"})
            return []

    def close(self) -> None:
        """Close the file, and give back what it needs no more."""
        if self._file is None:
            return
        self._reserve.close()
        # First: on a full disk the vacuum has no room but what the log gives back.
        self._bring_in_log()
        file, self._file = self._file, None
        with contextlib.suppress(sqlite3.Error):
            # As a script: a statement would be stepped once, and gives back one page at each step.
            file.executescript("PRAGMA incremental_vacuum;")
        file.close()


def _parted(writes: list[_Write]) -> tuple[list[_Write], list[Ticket]]:
    """Return the writes that must not be lost, and the messages of the others, which the disk will not have."""
    lost = [write.ticket for write in writes if write.may_be_lost and write.ticket is not None]
    for ticket in lost:
        ticket.stored = False
    return [write for write in writes if not write.may_be_lost], lost


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _reach(future: asyncio.Future[bool], stored: bool) -> None:
    if not future.done():
        future.set_result(stored)


def _ignore(_lost: list[Ticket]) -> None:
    """Do nothing."""
