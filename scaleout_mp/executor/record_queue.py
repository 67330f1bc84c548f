"""What a task has logged and nobody has read yet."""

from __future__ import annotations

import logging
import queue
import threading
from typing import TYPE_CHECKING, Final

from scaleout_mp.executor.output import text_size
from scaleout_mp.task import AttributesRecord, InferenceRecord, LogLine, MetricRecord, Record, TelemetryRecord

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

logger = logging.getLogger(__name__)

#: Bytes of records, roughly, that wait for a reader; past it the oldest go. Some 18,000 of one metric each.
MOST_WAITING: Final = 12 << 20
#: Bytes of a record, and of one entry of it, without its texts.
_RECORD: Final = 500
_ENTRY: Final = 150


class RecordQueue:
    """Filled on the executor's loop, read on any thread. A task that floods it costs its oldest records, not memory."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[Record, int] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._size = 0
        self._read_all = False
        #: Records that were dropped.
        self.dropped = 0

    def put(self, record: Record) -> None:
        """Add a record; never blocks."""
        size = _size(record)
        self._count(size)
        self._waiting.put((record, size))
        while self._size > MOST_WAITING:
            try:
                oldest = self._waiting.get_nowait()
            except queue.Empty:
                # The reader has just taken it, and will count it.
                return
            assert oldest is not None
            self._count(-oldest[1])
            if not self.dropped:
                text = "a task logs more than anybody reads: of the records that wait, the oldest go"
                logger.warning(text, extra={"action": "records_dropped"})
            self.dropped += 1

    def end(self) -> None:
        """Say that nothing more comes."""
        self._waiting.put(None)

    def __iter__(self) -> Iterator[Record]:
        """Yield each record once, as it comes, until the end."""
        while not self._read_all:
            waiting = self._waiting.get()
            if waiting is None:
                self._read_all = True
                # For whoever else waits, on another thread.
                self._waiting.put(None)
                return
            record, size = waiting
            self._count(-size)
            yield record

    def _count(self, size: int) -> None:
        with self._lock:
            self._size += size


def _size(record: Record) -> int:
    match record:
        case MetricRecord(metrics=values, context=context):
            ids = () if context is None else (context.model_id, context.round_id, context.session_id)
            return _RECORD + _numbers_size(values) + sum(text_size(part) for part in ids if part is not None)
        case TelemetryRecord(telemetry=values):
            return _RECORD + _numbers_size(values)
        case AttributesRecord(attributes=texts):
            return _RECORD + sum(_ENTRY + text_size(name) + text_size(text) for name, text in texts.items())
        case InferenceRecord(key=key, payload=payload, inference_id=inference_id, model_id=model_id):
            return _RECORD + sum(map(text_size, (key, payload, inference_id, model_id)))
        case LogLine(logger=name, message=message):
            return _RECORD + text_size(name) + text_size(message)


def _numbers_size(values: Mapping[str, float]) -> int:
    return sum(_ENTRY + text_size(name) for name in values)
