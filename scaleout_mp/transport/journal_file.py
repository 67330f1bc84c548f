"""The journal's file, as its thread sees it: SQLite on a disk that may be full, in a file that may be damaged."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import sqlite3
import time
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.transport.reserve import Reserve
from scaleout_mp.transport.salvage import is_sound, salvage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from scaleout_mp.transport.message import Ticket

logger = logging.getLogger(__name__)

#: Seconds in which a disk that is full now and then is one warning.
_QUIET: Final = 300.0
#: Seconds to wait for somebody else who has the file open.
_BUSY: Final = 5.0
#: The log is brought into the file when it has this share of what is held back, so that there is room for it.
_LOG_SHARE: Final = 2
#: Bytes of a row besides its message.
_ROW: Final = 64
#: Of one transaction of records, for the same reason.
_RECORDS_SHARE: Final = 4
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
class Write:
    """One statement, as it is handed over."""

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


class JournalFile:
    """The file, as the thread sees it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: sqlite3.Connection | None = None
        self._synchronous = "NORMAL"
        #: Writes that the disk has not taken yet, and that are not given up.
        self.held_back: list[Write] = []
        self._failing = False
        self._warned_at = -_QUIET
        self._reserve = Reserve(f"{path}-reserve")
        #: The size of the reserve that the log was made to fit.
        self._fitted = 0
        #: Whether it was damaged when it was opened.
        self.damaged = False

    def open(self) -> None:
        """Open the file; of a damaged one what can be read is taken over."""
        cut_off = os.path.exists(f"{self._path}-reserve") and not os.path.exists(f"{self._path}-wal")
        try:
            self._open()
            self._look_through()
        except (sqlite3.OperationalError, OSError) as error:
            raise sqlite3.OperationalError(self._why(error)) from error
        except sqlite3.DatabaseError as error:
            self._replace(error)
        else:
            if cut_off:
                # Both are there until the file is closed, and go then.
                logger.warning(
                    "%s-wal is gone: unless another program has brought it in, what the client noted last before it "
                    "was killed is lost, and may be told again",
                    self._path,
                    extra={"action": "journal_log_lost"},
                )
        self._reserve.take()
        if self._reserve.given:
            self._say_failing("there is no room on the disk")

    def _open(self) -> None:
        with contextlib.suppress(FileNotFoundError), open(self._path, "rb") as file:
            header = file.read(100)
            if header and not is_sound(header.ljust(100, b"\0")):
                raise sqlite3.DatabaseError("it is no database, or its header is damaged")
            if not os.access(self._path, os.W_OK):
                # SQLite would open it all the same, and fail at each write.
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        # Autocommit: transactions are begun and ended here, by name.
        self._file = sqlite3.connect(self._path, timeout=_BUSY, isolation_level=None)
        execute = self._file.execute
        (version,) = execute("PRAGMA user_version").fetchone()
        if version not in {0, _VERSION}:
            raise sqlite3.OperationalError(
                f"it was written by a newer version of this package (layout {version}, this one knows {_VERSION}); use "
                "that version, or another state folder"
            )
        if version == 0:
            # What writes only once: a disk that is full must not keep out who would make room on it.
            execute("PRAGMA auto_vacuum=INCREMENTAL")
        execute("PRAGMA journal_mode=WAL")
        execute("PRAGMA synchronous=NORMAL")
        if version == 0:
            self._file.executescript(f"BEGIN IMMEDIATE;{_LAYOUT}PRAGMA user_version={_VERSION};COMMIT;")
        for table, columns in _COLUMNS.items():
            if {name for _, name, *_ in execute(f"PRAGMA table_info({table})")} != columns:
                raise sqlite3.DatabaseError(f"its table {table} is another program's")

    def _look_through(self) -> None:
        """Raise DatabaseError when a page is damaged: else it would be met in the middle of work, at each start."""
        assert self._file is not None
        (said,) = self._file.execute("PRAGMA quick_check(1)").fetchone()
        if said != "ok":
            raise sqlite3.DatabaseError(" ".join(said.replace("*** in database main ***", "").split()))

    def _replace(self, error: sqlite3.DatabaseError) -> None:
        """Set the damaged file aside, and take over what can be read of it."""
        self.damaged = True
        aside = f"{self._path}.damaged"
        for suffix in ("-wal", "-shm", ""):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(aside + suffix)
        for suffix in ("-wal", "-shm", ""):
            with contextlib.suppress(FileNotFoundError):
                os.replace(self._path + suffix, aside + suffix)
        # After that: else the log would be gone from beside it.
        if self._file is not None:
            self._file.close()
        self._open()
        assert self._file is not None
        self._bring_in_log()
        found = salvage(aside, self._file, template=self._path)
        logger.error(
            "%s is damaged (%s): it is set aside as %s; taken over from it: %d results and statuses, %d records, "
            "and what is known of %d tasks",
            self._path,
            error,
            aside,
            found["results"],
            found["records"],
            found["tasks"],
            extra={"action": "journal_damaged"},
        )

    def _why(self, error: Exception) -> str:
        """Return what SQLite said, or what the operating system says when it was that."""
        for path in (self._path, f"{self._path}-wal", f"{self._path}-shm"):
            if os.path.isfile(path) and not os.access(path, os.R_OK | os.W_OK):
                owner = os.stat(path).st_uid
                return f"{path} is not this user's to read and write: it belongs to user {owner}"
        return (error.strerror if isinstance(error, OSError) else None) or str(error)

    def _fit_log(self) -> None:
        """Keep the log smaller than what is held back: there has to be room for all of it in the file."""
        if self._reserve.size == self._fitted:
            return
        assert self._file is not None
        self._fitted = self._reserve.size
        (page,) = self._file.execute("PRAGMA page_size").fetchone()
        self._file.execute(f"PRAGMA wal_autocheckpoint={self._fitted // _LOG_SHARE // page}")
        self._file.execute(f"PRAGMA journal_size_limit={8 * self._fitted}")

    def apply(self, writes: list[Write], *, sync: bool) -> list[Ticket]:
        """Execute the writes, in one transaction unless many of them are records.

        Returns the messages that are lost because the disk refused.
        """
        lost: list[Ticket] = []
        for run in _runs(writes, self._reserve.size // _RECORDS_SHARE):
            lost += self._apply(self.held_back + run, sync=sync)
        return lost

    def _apply(self, writes: list[Write], *, sync: bool) -> list[Ticket]:
        lost: list[Ticket] = []
        if self._reserve.given:
            # The room that is left is for what matters.
            writes, lost = _parted(writes)
        try:
            self._fit_log()
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

    def _rescue(self, writes: list[Write], error: sqlite3.Error) -> list[Ticket]:
        """Write what is vital without the rest, or hold it back until the disk takes it."""
        self._say_failing(str(error))
        kept, lost = _parted(writes)
        self._reserve.give()
        self._bring_in_log()
        try:
            self._transact(kept, sync=True)
            self.held_back = []
        except sqlite3.Error:
            self.held_back = kept
        return lost

    def _say_failing(self, why: str) -> None:
        if self._failing:
            return
        self._failing = True
        again = time.monotonic() < self._warned_at + _QUIET
        self._warned_at = time.monotonic()
        logger.log(
            logging.DEBUG if again else logging.WARNING,
            "%s cannot be written: %s; metrics and telemetry that find no room in memory are dropped, "
            "and a crash now would lose what waits for the server",
            self._path,
            why,
            extra={"action": "journal_failing"},
        )

    def _bring_in_log(self) -> None:
        """Have the log give back its room."""
        assert self._file is not None
        with contextlib.suppress(sqlite3.Error):
            self._file.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _transact(self, writes: Iterable[Write], *, sync: bool) -> None:
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
        except sqlite3.Error as error:
            logger.error(  # noqa: TRY400 - the line says it all
                "%s cannot be read: %s", self._path, error, extra={"action": "journal_unreadable"}
            )
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


def _runs(writes: list[Write], most: int) -> Iterator[list[Write]]:
    """Cut off runs of about so many bytes, before a record: what belongs together has none between."""
    run: list[Write] = []
    size = 0
    for write in writes:
        if size >= most and write.may_be_lost:
            yield run
            run, size = [], 0
        run.append(write)
        size += _ROW + (0 if write.ticket is None else len(write.ticket.packed))
    yield run


def _parted(writes: list[Write]) -> tuple[list[Write], list[Ticket]]:
    """Return the writes that must not be lost, and the messages of the others, which the disk will not have."""
    lost = [write.ticket for write in writes if write.may_be_lost and write.ticket is not None]
    for ticket in lost:
        ticket.stored = False
    return [write for write in writes if not write.may_be_lost], lost
