"""What a task logs and prints, in the supervisor: where it goes, and what it costs there."""

from __future__ import annotations

import logging
import sys
import threading

import pytest

from scaleout_mp.executor import output
from scaleout_mp.executor.output import OutputRelay, text_size
from scaleout_mp.executor.record_queue import MOST_WAITING, RecordQueue
from scaleout_mp.task import AttributesRecord, InferenceRecord, LogLine, MetricRecord, RecordContext

WIDE = "\U0001f600"


class Kept(logging.Handler):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.records = []

    def emit(self, record):
        self.records.append(record)


@pytest.fixture
def known():
    """A logger that is there, with what it is given."""
    logger = logging.getLogger("test_output.known")
    handler = Kept()
    logger.addHandler(handler)
    logger.propagate = False
    yield logger, handler.records
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)
    logger.filters.clear()
    logger.disabled = False


def relay_lines(*lines):
    relay = OutputRelay()
    for name, level in lines:
        relay.log(LogLine(logger=name, level=level, message="said", timestamp=1.0))
    relay.close()


def test_names_that_only_a_task_knows_make_no_loggers(known):
    logger, records = known
    before = dict(logging.Logger.manager.loggerDict)
    long = "test_output.known." + "a." * 500
    relay_lines(
        *((f"test_output.known.{number}.x", logging.ERROR) for number in range(300)),
        (long, logging.ERROR),
        ("." * 1000, logging.ERROR),
        ("", logging.ERROR),
        ("nobody.knows", logging.ERROR),
    )
    assert dict(logging.Logger.manager.loggerDict) == before
    assert [record.name for record in records] == [
        *(f"test_output.known.{number}.x" for number in range(300)),
        long[:256],
    ]
    assert {(record.getMessage(), record.created) for record in records} == {("said", 1.0)}
    assert logger.manager.loggerDict["test_output.known"] is logger


def test_a_name_without_a_logger_is_treated_as_a_child_of_the_nearest(known):
    logger, records = known
    logger.setLevel(logging.ERROR)
    logger.addFilter(lambda record: False)
    child = "test_output.known.child"
    relay_lines((child, logging.WARNING), (child, logging.ERROR), ("test_output.known", logging.ERROR))
    # The logger's filter is for what is logged with it.
    assert [(record.name, record.levelno) for record in records] == [(child, logging.ERROR)]
    # "test_output" is a part of a name, no logger; its parent is the root.
    assert isinstance(logging.Logger.manager.loggerDict["test_output"], logging.PlaceHolder)
    assert output._nearest_logger("test_output") is logging.getLogger()


def test_what_is_switched_off_here_stays_off(known):
    logger, records = known
    logger.disabled = True
    relay_lines(("test_output.known", logging.ERROR))
    assert records == []
    logging.disable(logging.ERROR)
    try:
        relay_lines(("test_output.known.child", logging.ERROR), ("test_output.known.child", logging.CRITICAL))
    finally:
        logging.disable(logging.NOTSET)
    assert [record.levelno for record in records] == [logging.CRITICAL]


@pytest.mark.parametrize("letter", ["a", "é", "漢", WIDE])
def test_the_size_of_a_text_is_that_in_memory(letter):
    assert sys.getsizeof(letter * 1000) - 100 < text_size(letter * 1000) <= sys.getsizeof(letter * 1000)


def records_of(text):
    def context():
        return RecordContext(model_id=text(1000), round_id=text(1000), session_id=text(1000))

    yield lambda: LogLine(logger=text(1000), level=20, message=text(60_000), timestamp=0.0)
    yield lambda: AttributesRecord(attributes={text(1000): text(60_000)}, timestamp=0.0)
    yield lambda: InferenceRecord(
        key=text(1000), payload=text(200_000), inference_id=text(1000), model_id=text(1000), timestamp=0.0
    )
    yield lambda: MetricRecord(metrics={text(1000): 1.0}, step=None, timestamp=0.0, context=context())


@pytest.mark.parametrize("letter", ["a", WIDE])
def test_records_that_wait_take_no_more_memory_than_said(letter):
    for make in records_of(lambda length: letter * length):
        size = sum(sys.getsizeof(text) for text in texts_of(make()))
        waiting = RecordQueue()
        for _ in range(2 * MOST_WAITING // size):
            waiting.put(make())
        waiting.end()
        assert waiting.dropped
        left = list(waiting)
        assert 0.8 * MOST_WAITING < len(left) * size < 1.02 * MOST_WAITING


def texts_of(record):
    match record:
        case LogLine():
            return [record.logger, record.message]
        case AttributesRecord():
            return [text for entry in record.attributes.items() for text in entry]
        case InferenceRecord():
            return [record.key, record.payload, record.inference_id, record.model_id]
        case _:
            context = record.context
            return [*record.metrics, context.model_id, context.round_id, context.session_id]


def test_output_that_nobody_reads_takes_no_more_memory_than_said(monkeypatch):
    let_go, written = threading.Event(), []

    class Stopped:
        """A terminal after Ctrl-S."""

        def write(self, text):
            let_go.wait(20)
            written.append(sys.getsizeof(text))

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stdout", Stopped())
    relay = OutputRelay()
    piece = WIDE * 16_000
    for _ in range(1000):
        relay.echo("stdout", piece + "\n")
    let_go.set()
    relay.close()
    # One was being written, and one went over the bound.
    assert sum(written) < output._MOST_WAITING_SIZE + 3 * sys.getsizeof(piece)
    assert sum(written) > output._MOST_WAITING_SIZE / 2
