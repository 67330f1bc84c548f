"""Records in shared memory: what goes in comes out, and nothing that the other side writes can hurt."""

from __future__ import annotations

import asyncio
import fcntl
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from observing import open_descriptors

from scaleout_mp.errors import ProtocolViolation
from scaleout_mp.ipc import frames, ring
from scaleout_mp.ipc.channel import ChildChannel, channel_pair
from scaleout_mp.ipc.frames import Kind
from scaleout_mp.ipc.loop_channel import SupervisorChannel
from scaleout_mp.ipc.ring import CAPACITY, RingReader, RingWriter


@pytest.fixture(autouse=True)
def same_descriptors():
    before = open_descriptors()
    yield
    assert not open_descriptors().keys() - before.keys()


def pair():
    writer = RingWriter()
    reader = RingReader(os.dup(writer.descriptor))
    writer.close_descriptor()
    return writer, reader


@given(st.lists(st.tuples(st.binary(max_size=3 * CAPACITY // 4), st.integers(0, CAPACITY)), max_size=12))
def test_bytes_come_out_in_order_and_whole(steps):
    writer, reader = pair()
    sent, received = b"", b""
    for data, most in steps:
        sent += data[: writer.write(data)]
        received += reader.read(most)
    received += reader.read(CAPACITY)
    assert received == sent
    assert not reader.filled
    writer.close()
    reader.close()


def test_a_full_ring_takes_no_more_until_it_is_read():
    writer, reader = pair()
    assert writer.write(b"x" * (CAPACITY + 1)) == CAPACITY
    assert writer.write(b"x") == 0
    assert len(reader.read(10)) == 10
    assert writer.write(b"y" * 11) == 10
    assert reader.read(CAPACITY) == b"x" * (CAPACITY - 10) + b"y" * 10
    writer.close()
    reader.close()


@pytest.mark.parametrize("count", [CAPACITY + 1, 1 << 63, (1 << 64) - 1])
def test_an_absurd_count_is_a_violation(count):
    writer, reader = pair()
    writer._counters[0] = count
    with pytest.raises(ProtocolViolation, match="are said to be in memory"):
        reader.read(CAPACITY)
    writer.close()
    reader.close()


def test_a_count_that_goes_back_is_a_violation():
    writer, reader = pair()
    writer.write(b"abc")
    reader.read(3)
    writer._counters[0] = 1
    with pytest.raises(ProtocolViolation):
        reader.read(CAPACITY)
    writer.close()
    reader.close()


def memory(size=ring._SIZE, seals=ring._SEALS):
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


@pytest.mark.parametrize(
    "descriptor",
    [
        lambda: os.open("/dev/zero", os.O_RDWR),
        lambda: memory(seals=0),
        lambda: memory(seals=ring._SEALS & ~fcntl.F_SEAL_SHRINK),
        lambda: memory(size=ring._SIZE - 4096),
        lambda: memory(size=1 << 40),
        lambda: os.eventfd(0),
    ],
    ids=["device", "unsealed", "shrinkable", "short", "huge", "eventfd"],
)
def test_what_is_no_such_memory_is_refused_and_closed(descriptor):
    with pytest.raises(ProtocolViolation):
        RingReader(descriptor())


async def poll(condition):
    """Let the loop turn until something holds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - nothing there could set an event
            await asyncio.sleep(0.001)


class Ends:
    """Both ends of a channel, the supervisor's on the running loop."""

    def __init__(self):
        ours, theirs = channel_pair()
        self.frames, self.closed = [], []
        self.supervisor = SupervisorChannel(ours, on_frame=self._on_frame, on_closed=self.closed.append)
        self.child = ChildChannel(theirs)

    def _on_frame(self, frame):
        self.frames.append((frame.kind, frame.fields))

    async def until(self, count):
        await poll(lambda: len(self.frames) >= count)

    def close(self):
        self.supervisor.close()
        self.child.close()


def test_records_keep_their_order_and_come_before_what_is_sent_after_them():
    async def main():
        ends = Ends()
        for number in range(1000):
            ends.child.record(Kind.LOG, number)
            if number % 300 == 299:
                ends.child.send(frames.encode(Kind.STATE, number))
        await ends.until(1003)
        assert [fields[0] for kind, fields in ends.frames if kind is Kind.LOG] == list(range(1000))
        for number in (299, 599, 899):
            assert ends.frames.index((Kind.STATE, [number])) > ends.frames.index((Kind.LOG, [number]))
        ends.close()

    asyncio.run(main())


def test_whatever_stands_in_the_shared_counts_the_supervisor_goes_on():
    async def main():
        ends = Ends()
        for number in range(20):
            ends.child.record(Kind.LOG, number)
        await ends.until(20)
        for place in range(1, 512):
            ends.child._ring._view[place * 8 : place * 8 + 8] = b"\xff" * 8
        for number in range(20, 40):
            ends.child._ring.write(frames.encode(Kind.LOG, number)) or ends.child._ring_bell()
            ends.child._ring._counters[8] = 0
            ends.child._ring_bell()
        ends.supervisor.send(frames.encode(Kind.ABORT, "enough", "id"))
        await ends.until(40)
        assert not ends.closed
        ends.close()

    asyncio.run(main())


def test_a_record_after_a_pause_arrives_though_nobody_looked():
    async def main():
        ends = Ends()
        for number in range(20):
            ends.child.record(Kind.LOG, number)
        await ends.until(20)
        # Longer than the supervisor goes on looking.
        await poll(lambda: ends.supervisor._inbox._look is None)
        ends.child.record(Kind.LOG, 20)
        await ends.until(21)
        ends.close()

    asyncio.run(main())


def test_records_larger_than_the_ring_pass_and_the_writer_waits_for_a_slow_reader():
    async def main():
        ends = Ends()
        sent = [os.urandom(size) for size in (10, 10, 10, 10, 10, 3 * CAPACITY, 17, CAPACITY, CAPACITY - 20, 5)]
        writer = threading.Thread(target=lambda: [ends.child.record(Kind.LOG, data) for data in sent])
        writer.start()
        await ends.until(len(sent))
        writer.join(5)
        assert [fields for _, fields in ends.frames] == [[data] for data in sent]
        ends.close()

    asyncio.run(main())


def test_what_was_recorded_counts_when_the_other_end_dies():
    async def main():
        ends = Ends()
        for number in range(200):
            ends.child.record(Kind.LOG, number)
        ends.child.close()
        await poll(lambda: ends.closed)
        assert [fields[0] for _, fields in ends.frames] == list(range(200))
        assert ends.closed == [None]

    asyncio.run(main())


def test_an_abort_is_seen_by_who_has_a_ring():
    async def main():
        ends = Ends()
        for number in range(20):
            ends.child.record(Kind.LOG, number)
        await ends.until(20)
        while ends.child.receive_ready() is not None:
            pass
        assert ends.child.receive_ready() is None
        ends.supervisor.send(frames.encode(Kind.ABORT, "enough", "id"))
        assert ends.child.receive_ready().fields == ["enough", "id"]
        ends.close()

    asyncio.run(main())


@pytest.mark.parametrize("sent_before", [True, False])
def test_an_abort_from_before_the_ring_is_seen_as_well(sent_before):
    async def main():
        ends = Ends()
        if sent_before:
            ends.supervisor.send(frames.encode(Kind.ABORT, "enough", "id"))
        for number in range(20):
            ends.child.record(Kind.LOG, number)
        if not sent_before:
            ends.supervisor.send(frames.encode(Kind.ABORT, "enough", "id"))
        await ends.until(20)
        assert ends.child.receive_ready().fields == ["enough", "id"]
        ends.close()

    asyncio.run(main())


def write(ends, data):
    """Put bytes into the ring as a task that breaks the rules would."""
    ends.child._ring.write(data)
    ends.child._ring_bell()


@pytest.mark.parametrize(
    ("mischief", "why"),
    [
        (lambda ends: write(ends, frames.encode(Kind.RESULT, None)), "came where records come"),
        (lambda ends: write(ends, frames.encode(Kind.LOG, 1, descriptors=1)), "came where records come"),
        (lambda ends: write(ends, b"\xff\xff\xff\xff"), "announces"),
        (lambda ends: ends.child.send(frames.encode(Kind.RING)), "came twice"),
        (lambda ends: ends.child._ring._counters.__setitem__(0, 1 << 60), "are said to be"),
    ],
    ids=["result", "descriptors", "length", "twice", "count"],
)
def test_who_breaks_the_rules_of_the_ring_is_cut_off(mischief, why):
    async def main():
        ends = Ends()
        for number in range(20):
            ends.child.record(Kind.LOG, number)
        await ends.until(20)
        mischief(ends)
        await poll(lambda: ends.closed)
        assert why in str(ends.closed[0])
        assert len(ends.frames) == 20
        ends.close()

    asyncio.run(main())


def test_without_memory_for_a_ring_the_socket_does_it(monkeypatch):
    def refuse(self):
        raise OSError(27, "File too large")

    monkeypatch.setattr(RingWriter, "__init__", refuse)

    async def main():
        ends = Ends()
        for number in range(100):
            ends.child.record(Kind.LOG, number)
        await ends.until(100)
        assert [fields[0] for _, fields in ends.frames] == list(range(100))
        ends.close()

    asyncio.run(main())
