"""What can still be read of a journal that is damaged: what lies before, between and after the pages that are no good.

SQLite gives up a query at the first such page, but it finds rows by their keys: so each table is read from both ends,
and what is left between in halves.
"""

from __future__ import annotations

import collections
import contextlib
import os
import shutil
import sqlite3
import urllib.parse
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.message import DecodeError

from scaleout_mp.transport.message import MessageKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

#: Queries that fail before the rest of a table is given up.
_TRIES: Final = 400
_LAST: Final = 1 << 48
#: Rows that are written in one go.
_BATCH: Final = 1_000
_PAGE_SIZES: Final = frozenset(1 << power for power in range(9, 17))

Row = tuple[Any, ...]


def is_sound(header: bytes) -> bool:
    """Whether a file of SQLite may begin like this: https://www.sqlite.org/fileformat.html, "The Database Header"."""
    size = int.from_bytes(header[16:18], "big")
    return (
        header[:16] == b"SQLite format 3\0"
        and (65536 if size == 1 else size) in _PAGE_SIZES
        and header[18] in {1, 2}
        and header[19] in {1, 2}
        and header[21:24] == b"\x40\x20\x20"
        and int.from_bytes(header[44:48], "big") <= 4
        # No version of this package will ever have such a number.
        and int.from_bytes(header[60:64], "big") < 1 << 16
    )


def salvage(damaged: str, into: sqlite3.Connection, *, template: str) -> collections.Counter[str]:
    """Copy to `into`, by tables, the rows of the file `damaged` that make sense; return how many of each.

    `template` is the path of a file of the same layout, and empty: where the header is gone, its first page does.
    """
    found: collections.Counter[str] = collections.Counter()
    # A disk that is full ends it; what is left is in the file that was put aside.
    with contextlib.suppress(sqlite3.Error, OSError), _readable(damaged, template) as file:
        for table, rows in (("tasks", _tasks(file)), ("results", _results(file)), ("records", _records(file))):
            for batch in _batches(rows):
                places = ", ".join("?" * len(batch[0]))
                into.execute("BEGIN IMMEDIATE")
                try:
                    into.executemany(f"INSERT OR IGNORE INTO {table} VALUES({places})", batch)
                    into.execute("COMMIT")
                except BaseException:
                    with contextlib.suppress(sqlite3.Error):
                        into.execute("ROLLBACK")
                    raise
                found[table] += len(batch)
    return found


@contextlib.contextmanager
def _readable(damaged: str, template: str) -> Iterator[sqlite3.Connection]:
    """Open the file, or a copy with another first page where its own is no good."""
    with open(damaged, "rb") as file:
        sound = is_sound(file.read(100))
    path = damaged
    try:
        if not sound:
            path = f"{damaged}.copy"
            _with_first_page_of(template, damaged, path)
        # Read-only: else the log would be brought into the file that is kept to be looked at.
        uri = f"file:{urllib.parse.quote(path)}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as connection:
            # What is no text must not end a query.
            connection.text_factory = bytes
            # Only with this a file is read that is shorter than its header says.
            connection.execute("PRAGMA writable_schema=ON")
            yield connection
    finally:
        # What SQLite makes beside a file that it only reads; and the copy.
        needless = ["-shm"] if path == damaged else ["", "-wal", "-shm"]
        with contextlib.suppress(FileNotFoundError):
            if os.path.getsize(f"{damaged}-wal") == 0:
                needless.append("-wal")
        for suffix in needless:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path + suffix)


def _with_first_page_of(template: str, damaged: str, copy: str) -> None:
    with contextlib.closing(sqlite3.connect(template)) as connection:
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    with open(template, "rb") as file:
        page = bytearray(file.read(size))
    # With these two unequal, the number of pages is that of the file: "In-header database size".
    page[92:96] = b"\0\0\0\0"
    shutil.copyfile(damaged, copy)
    with open(copy, "r+b") as file:
        file.write(page)
    with contextlib.suppress(FileNotFoundError):
        shutil.copyfile(f"{damaged}-wal", f"{copy}-wal")


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _tasks(file: sqlite3.Connection) -> Iterator[Row]:
    columns = "correlation_id, number, state, request, status, response, result, error"
    for _, key, number, state, request, *texts in _table(file, "tasks", columns):
        said = [None if text is None else _text(text) for text in texts]
        if _text(key) and isinstance(number, int) and _text(state) and isinstance(request, bytes):
            yield (_text(key), number, _text(state), request, *said)


def _results(file: sqlite3.Connection) -> Iterator[Row]:
    for number, lane, kind, packed in _table(file, "results", "lane, kind, packed"):
        if _is_message(lane, kind, packed):
            yield number, _text(lane), _text(kind), packed


def _table(file: sqlite3.Connection, table: str, columns: str) -> Iterator[Row]:
    query = f"SELECT rowid, {columns} FROM {table} NOT INDEXED WHERE rowid > ? AND rowid <= ? ORDER BY rowid"  # noqa: S608 - our names
    yield from _around(lambda low, high, order: file.execute(f"{query} {order}", (low, high)))


def _records(file: sqlite3.Connection) -> Iterator[Row]:
    query = "SELECT id, kind, packed FROM records WHERE lane = ? AND id > ? AND id <= ? ORDER BY id"
    for lane in _lanes(file):

        def read(low: int, high: int, order: str, lane: str = lane) -> Iterable[Row]:
            return file.execute(f"{query} {order}", (lane, low, high))

        for number, kind, packed in _around(read):
            if _is_message(lane.encode(), kind, packed):
                yield lane, number, _text(kind), packed


def _lanes(file: sqlite3.Connection) -> list[str]:
    """Return the tasks of which there may be records, from both ends and by what else is known of tasks."""
    found: dict[str, None] = {"": None}
    for query, start in (
        ("SELECT min(lane) FROM records WHERE lane > ?", ""),
        ("SELECT max(lane) FROM records WHERE lane < ?", "\U0010ffff"),
    ):
        lane: str | None = start
        with contextlib.suppress(sqlite3.Error):
            while (lane := _text(file.execute(query, (lane,)).fetchone()[0])) not in found and lane is not None:
                found[lane] = None
    for table, column in (("tasks", "correlation_id"), ("results", "lane")):
        found |= dict.fromkeys(_text(row[1]) or "" for row in _table(file, table, column))
    return list(found)


def _around(read: Callable[[int, int, str], Iterable[Row]]) -> Iterator[Row]:
    """Yield the rows that `read(low, high, order)` can give, each once: low < their first column <= high."""
    left, tries = [(-1, _LAST)], 0
    while left and tries < _TRIES:
        low, high = left.pop()
        try:
            for row in read(low, high, "ASC"):
                low = row[0]
                yield row
            continue
        except sqlite3.Error:
            tries += 1
        try:
            for row in read(low, high, "DESC"):
                high = row[0] - 1
                yield row
            continue
        except sqlite3.Error:
            tries += 1
        middle = (low + high) // 2
        if low < middle < high:
            # What comes first is read first: the end may be far beyond the last row.
            left += [(middle, high), (low, middle)]


def _is_message(lane: Any, kind: Any, packed: Any) -> bool:
    name = _text(kind)
    if name is None or _text(lane) is None or not isinstance(packed, bytes):
        return False
    return name in MessageKind.__members__ and can_be_read(MessageKind[name], packed)


def can_be_read(kind: MessageKind, packed: bytes) -> bool:
    """Whether the bytes are a message of that kind."""
    try:
        kind.value.request.FromString(packed)
    except DecodeError:
        return False
    return True


def _text(value: Any) -> str | None:
    try:
        return value.decode() if isinstance(value, bytes) else None
    except UnicodeDecodeError:
        return None
