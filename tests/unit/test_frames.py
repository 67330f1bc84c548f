"""Frames and the checks on what a child says."""

from __future__ import annotations

import os
import socket

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaleout_mp.errors import ChannelError, ProtocolViolation
from scaleout_mp.ipc import frames, messages, values
from scaleout_mp.ipc.channel import ChildChannel, channel_pair
from scaleout_mp.ipc.frames import Frame, FrameDecoder, Kind
from scaleout_mp.task import Record

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4) | st.tuples(inner, inner),
    max_leaves=20,
)


def require_sendable(value):
    """Require that what was taken for a value is one."""
    with values.encode(value) as encoded:
        assert encoded.table


def simplified(value):
    """What msgpack makes of tuples."""
    if isinstance(value, list | tuple):
        return [simplified(item) for item in value]
    if isinstance(value, dict):
        return {key: simplified(item) for key, item in value.items()}
    return value


@given(st.lists(st.tuples(st.sampled_from(Kind), st.lists(plain, max_size=3)), max_size=5), st.data())
def test_frames_survive_any_cut(sent, data):
    stream = b"".join(frames.encode(kind, *fields) for kind, fields in sent)
    decoder = FrameDecoder()
    received = []
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        received += decoder.feed(stream[:cut])
        stream = stream[cut:]
    assert received == [(kind, 0, simplified(fields)) for kind, fields in sent]
    assert decoder.pending == 0


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_frames_or_a_violation(data):
    decoder = FrameDecoder()
    try:
        decoder.feed(data)
    except ProtocolViolation:
        return
    assert decoder.pending <= len(data)


def test_a_frame_over_the_bound_is_refused_on_both_sides():
    with pytest.raises(ProtocolViolation, match="over the bound"):
        frames.encode(Kind.LOG, "x" * frames.MAX_FRAME)
    with pytest.raises(ProtocolViolation, match="over the bound"):
        FrameDecoder().feed((frames.MAX_FRAME + 1).to_bytes(4, "little"))


@given(st.sampled_from(sorted(messages.RECORD_KINDS)), st.lists(plain, max_size=5))
def test_any_fields_are_a_record_or_a_violation(kind, fields):
    try:
        record = messages.parse_record(Frame(kind, fields, []))
    except ProtocolViolation:
        return
    assert isinstance(record, Record)


@given(plain)
def test_returned_values_come_back_equal(value):
    with values.encode(value) as encoded:
        table = msgpack.unpackb(msgpack.packb(encoded.table))
        descriptors = [os.dup(descriptor) for descriptor in encoded.descriptors]
    assert values.decode(table, descriptors, max_model_size=1 << 20) == value


@given(plain)
def test_arbitrary_tables_are_values_or_a_violation(table):
    try:
        value = values.decode(simplified(table), [], max_model_size=1 << 20)
    except ProtocolViolation:
        return
    require_sendable(value)


@given(st.binary(max_size=300))
def test_arbitrary_trees_are_values_or_a_violation(tree):
    try:
        value = values.decode([False, [tree, b"12345678"]], [], max_model_size=1 << 20)
    except ProtocolViolation:
        return
    require_sendable(value)


def pair():
    ours, theirs = channel_pair()
    return ChildChannel(ours), theirs


def test_descriptors_travel_beside_their_frame():
    channel, theirs = pair()
    reader, writer = os.pipe()
    ChildChannel(theirs).send(frames.encode(Kind.TASK, "x", descriptors=1), [writer])
    os.close(writer)
    frame = channel.receive()
    assert frame.kind is Kind.TASK
    os.write(frame.descriptors[0], b"through")
    assert os.read(reader, 100) == b"through"
    assert not os.get_inheritable(frame.descriptors[0])
    os.close(reader)
    os.close(frame.descriptors[0])
    channel.close()
    theirs.close()


def test_descriptors_that_no_frame_announced_are_a_violation_and_closed():
    channel, theirs = pair()
    reader, writer = os.pipe()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        socket.send_fds(theirs, [b"\x00"], [writer] * frames.MAX_DESCRIPTORS)
    assert channel.receive_ready() is None
    with pytest.raises(ProtocolViolation, match="no frame announced"):
        channel.receive_ready()
    channel.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1
    for descriptor in (reader, writer):
        os.close(descriptor)
    theirs.close()


def test_more_descriptors_at_once_than_fit_are_a_violation():
    channel, theirs = pair()
    reader, writer = os.pipe()
    before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(theirs, [b"\x00"], [writer] * 200)
    with pytest.raises(ProtocolViolation, match="at once"):
        channel.receive_ready()
    channel.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1
    for descriptor in (reader, writer):
        os.close(descriptor)
    theirs.close()


def test_a_closed_channel_says_so():
    channel, theirs = pair()
    assert channel.receive_ready() is None
    theirs.close()
    with pytest.raises(ChannelError):
        channel.receive_ready()
    assert channel.receive() is None
    with pytest.raises(ChannelError):
        channel.send(frames.encode(Kind.LOG))
    channel.close()
