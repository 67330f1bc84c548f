"""What a task prints: the last of it is kept for the report, all of it is passed on if wanted."""

from __future__ import annotations

import asyncio
import codecs
import logging
import os
import queue
import sys
import threading
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable

    from scaleout_mp.task import LogLine

_READ: Final = 1 << 16
#: Pieces of output and log lines that wait for a slow terminal before more are dropped.
_MOST_WAITING: Final = 10_000
#: Bytes of them.
_MOST_WAITING_SIZE: Final = 1 << 23
#: Characters of a logger's name that are kept, and how many names with dots between them are looked up in it.
_MOST_NAME: Final = 256
_MOST_PARTS: Final = 32
_NO_TEXT: Final = sys.getsizeof("")


def text_size(text: str) -> int:
    """Return the bytes that a text takes in memory beyond those of an empty one: one to four for each character."""
    return sys.getsizeof(text) - _NO_TEXT


class OutputRelay:
    """Passes output and log lines on to this process's own streams and loggers, from a thread of its own.

    A terminal that was stopped with Ctrl-S, a full disk under a log file or a slow handler must not hold up the
    event loop, which owns heartbeats and deadlines.
    """

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[Callable[[], None], int] | None] = queue.Queue(_MOST_WAITING)
        self._waiting_size = 0
        self._lock = threading.Lock()
        self._dropped = 0
        self._thread: threading.Thread | None = None

    def echo(self, stream: str, text: str) -> None:
        """Write text to `sys.stdout` or `sys.stderr`, whatever that is at that moment."""
        self._put(lambda: _write(getattr(sys, stream), text), text_size(text))

    def log(self, line: LogLine) -> None:
        """Hand a record to the logger of the same name in this process, or to the nearest above it that there is."""
        name = line.logger[:_MOST_NAME]
        target = _nearest_logger(name)
        if _is_enabled(target, name, line.level):
            self._put(lambda: _handle(target, name, line), text_size(line.message))

    def _put(self, action: Callable[[], None], size: int) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="scaleout-output", daemon=True)
            self._thread.start()
        if self._waiting_size > _MOST_WAITING_SIZE:
            self._dropped += 1
            return
        try:
            self._queue.put_nowait((action, size))
        except queue.Full:
            self._dropped += 1
        else:
            self._count(size)

    def _count(self, size: int) -> None:
        with self._lock:
            self._waiting_size += size

    def _run(self) -> None:
        while (waiting := self._queue.get()) is not None:
            action, size = waiting
            self._count(-size)
            try:
                action()
            except Exception:  # noqa: BLE001 - a stream that is closed, or a handler of the user's: the next goes on
                self._dropped += 1

    def close(self) -> None:
        """Pass on what waits, at most for a second."""
        if self._thread is None:
            return
        try:
            self._queue.put(None, timeout=1)
        except queue.Full:
            return
        self._thread.join(1)
        self._thread = None
        if self._dropped:
            logging.getLogger(__name__).warning(
                "%d pieces of task output were not shown", self._dropped, extra={"action": "output_dropped"}
            )


def _write(stream: TextIO | None, text: str) -> None:
    if stream is not None:
        stream.write(text)
        stream.flush()


def _nearest_logger(name: str) -> logging.Logger:
    """Return the logger of that name, or the one that would be its parent.

    None is made: it would stay for ever, and a task may think of any number of names.
    """
    known = logging.Logger.manager.loggerDict
    parts = name.split(".", _MOST_PARTS)[:_MOST_PARTS]
    while parts:
        # Else a placeholder, which stands for a part of others' names only.
        found = known.get(".".join(parts))
        if isinstance(found, logging.Logger):
            return found
        parts.pop()
    return logging.getLogger()


def _is_enabled(target: logging.Logger, name: str, level: int) -> bool:
    if target.name == name:
        return target.isEnabledFor(level)
    # As a child of it would say, which has no level of its own and is not disabled with it.
    return level > target.manager.disable and level >= target.getEffectiveLevel()


def _handle(target: logging.Logger, name: str, line: LogLine) -> None:
    record = target.makeRecord(name, line.level, "(task)", 0, line.message, (), None)
    record.created = line.timestamp
    if target.name == name:
        target.handle(record)
    else:
        # A logger's own filters are not for what comes from below it, its handlers are.
        target.callHandlers(record)


class OutputTail:
    """Reads one stream of one task off a pipe."""

    def __init__(self, descriptor: int, on_text: Callable[[str], None] | None, *, kept: int) -> None:
        """Keep the last `kept` bytes."""
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._on_text = on_text
        self._most = kept
        self._kept = bytearray()
        #: Bytes that came and were not kept.
        self.lost = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._loop = asyncio.get_running_loop()
        self._open = True
        self._loop.add_reader(descriptor, self._read)

    def _read(self) -> bool:
        try:
            data = os.read(self._descriptor, _READ)
        except BlockingIOError:
            return False
        if not data:
            self.close()
            return False
        self._kept += data
        surplus = max(0, len(self._kept) - self._most)
        self.lost += surplus
        del self._kept[:surplus]
        if self._on_text is not None:
            self._on_text(self._decoder.decode(data))
        return True

    def drain(self) -> None:
        """Read what is in the pipe now; called once every writer is dead, so a pipe's capacity bounds it."""
        for _ in range(1 << 8):
            if not self._open or not self._read():
                return

    def restart(self, *, kept: int) -> None:
        """Forget what came so far: the process serves another task. Keep the last `kept` bytes of that."""
        self._most = kept
        self._kept.clear()
        self.lost = 0

    def close(self) -> None:
        """Stop reading."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)

    @property
    def text(self) -> str:
        """The end of the stream, whole lines where possible."""
        text = self._kept.decode("utf-8", "backslashreplace")
        if self.lost:
            text = text.partition("\n")[2] or text
        return text
