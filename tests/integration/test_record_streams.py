"""Records that are streamed and acknowledged, against a network of either release."""

from __future__ import annotations

import asyncio
import json
import uuid

import edge_callbacks as callbacks
import grpc
import pytest
from edge_running import RunningClient
from observing import wait_until

from scaleout_mp import InferenceContext
from scaleout_mp.errors import CallError
from scaleout_mp.localnet import Fault, LocalNetworkThread
from scaleout_mp.localnet.events import (
    AttributeReceived,
    BacklogReceived,
    HeartbeatReceived,
    InferenceReceived,
    PollReceived,
    TelemetryReceived,
)
from scaleout_mp.supervisor import vitals
from scaleout_mp.transport.calls import CombinerCalls
from scaleout_mp.transport.channel import CallCredentials, open_channel
from scaleout_mp.transport.message import MessageKind, Ticket
from scaleout_mp.transport.record_streams import RecordStreams
from scaleout_mp.transport.sending import records_of
from scaleout_mp.wire import edge_pb2 as pb
from scaleout_mp.wire import methods

CONTEXT = InferenceContext(inference_id="i-1", model_id="m-1")


@pytest.fixture
def net(tmp_path):
    with LocalNetworkThread(tmp_path / "net") as network:
        yield network


@pytest.fixture
def old_net(tmp_path):
    with LocalNetworkThread(tmp_path / "old", release="1.0") as network:
        yield network


def completed(net, edge):
    edge.client.set_custom_callback("log", callbacks.log_all)
    outcome = edge.issue("Custom_log", parameters={"a": 1}).done(20)
    assert outcome.completed, outcome
    return outcome


def test_what_a_task_logs_is_streamed_and_acknowledged_before_its_end_is_told(net):
    with RunningClient(net) as edge:
        assert completed(net, edge).response == {"a": 1}
    telemetry = net.events.of(TelemetryReceived)
    assert [event.telemetry for event in telemetry] == [{"heat": 40.0}, {"load": 0.5}]
    (attributes,) = net.events.of(AttributeReceived)
    assert attributes.attributes == {"site": "lund"}
    first, second = net.events.of(InferenceReceived)
    assert (first.key, first.payload, first.inference_id, first.model_id) == (
        "detection",
        {"box": [1, 2], "score": 0.5},
        "i-1",
        "m-1",
    )
    assert (second.key, second.payload) == ("label", {"value": "cat"})
    ids = [event.record_id for event in (*telemetry, attributes, first, second)]
    assert len({uuid.UUID(one) for one in ids}) == 5


def test_a_server_of_release_1_0_gets_calls_and_the_results_of_inference_are_counted_out(old_net, caplog):
    with RunningClient(old_net) as edge:
        completed(old_net, edge)
        # Said once, and not asked again.
        completed(old_net, edge)
        assert edge.runtime._at_work[1]._outbox.counts.dropped == 4
    assert [event.telemetry for event in old_net.events.of(TelemetryReceived)] == [{"heat": 40.0, "load": 0.5}] * 2
    assert [event.record_id for event in old_net.events.of(TelemetryReceived)] == ["", ""]
    assert [event.attributes for event in old_net.events.of(AttributeReceived)] == [{"site": "lund"}] * 2
    assert not old_net.events.of(InferenceReceived)
    assert caplog.text.count("takes no results of inference") == 1


def test_a_program_logs_results_outside_of_any_task(net, caplog):
    with RunningClient(net) as edge:
        assert edge.client.log_inference_result("a", {"n": 1}) is False
        assert "no inference context" in caplog.text
        assert edge.client.log_inference_result("a", 3, context=CONTEXT, priority="alert")
        event = net.wait_for(lambda event: isinstance(event, InferenceReceived), timeout=10)
        with pytest.raises(TypeError, match=r"payload\['x'\] is of type object"):
            edge.client.log_inference_result("a", {"x": object()}, context=CONTEXT)
        with pytest.raises(ValueError, match="bytes of JSON"):
            edge.client.log_inference_result("a", {"x": "y" * (1 << 18)}, context=CONTEXT)
    assert (event.client_id, event.payload) == (edge.id, {"value": 3})


@pytest.mark.parametrize("after", [False, True])
def test_a_stream_that_breaks_is_opened_again_and_what_was_not_acknowledged_goes_again(net, after):
    fault = Fault(code=grpc.StatusCode.UNAVAILABLE, after=after)
    for method in ("StreamTelemetryRecord", "StreamAttributeRecord", "StreamInferenceResult"):
        net.faults.add(method, fault, times=2)
    with RunningClient(net) as edge:
        completed(net, edge)
    # A record whose acknowledgement got lost comes again under its id.
    keys = {event.record_id: event.key for event in net.events.of(InferenceReceived)}
    assert sorted(keys.values()) == ["detection", "label"]
    assert len({event.record_id for event in net.events.of(TelemetryReceived)}) == 2
    assert len(net.events.of(AttributeReceived)) == (3 if after else 1)


def test_a_restart_of_the_combiner_loses_no_record(net):
    with RunningClient(net) as edge:
        for number in range(300):
            edge.client.log_inference_result("n", {"value": number}, context=CONTEXT)
            if number == 100:
                net.stop_combiner()
                net.restart_combiner()
        wait_until(
            lambda: {e.payload["value"] for e in net.events.of(InferenceReceived)} == set(range(300)),
            seconds=20,
            what="all results",
        )
    ids = {(event.record_id, event.payload["value"]) for event in net.events.of(InferenceReceived)}
    assert len(ids) == 300


def test_a_stream_whose_token_has_ended_goes_on_with_a_fresh_one(tmp_path):
    with LocalNetworkThread(tmp_path / "locked", token="secret", token_lifetime=600) as net:
        with RunningClient(net, token="secret") as edge:
            net.faults.add("StreamTelemetryRecord", Fault(code=grpc.StatusCode.UNAUTHENTICATED))
            edge.client.log_telemetry({"a": 1})
            net.wait_for(lambda event: isinstance(event, TelemetryReceived), timeout=10)
        assert len(net.events.of(TelemetryReceived)) == 1


def with_streams(net, act, **options):
    async def main():
        host, port = net.combiner_address.split(":")
        calls = CombinerCalls(open_channel(host, int(port), secure=False), CallCredentials(client_id="c", name="n"))
        streams = RecordStreams(calls, **options)
        try:
            return await act(streams)
        finally:
            await streams.aclose()
            await calls.aclose()

    return asyncio.run(main())


def test_a_record_that_is_never_acknowledged_is_given_up_and_the_next_stream_works(net):
    net.faults.add("StreamTelemetryRecord", Fault(delay=30))

    async def act(streams):
        record = pb.TelemetryRecord(telemetry_id="t", client_id="c", key="k", payload="{}").SerializeToString()
        with pytest.raises(Exception, match="no acknowledgement came"):
            await streams.deliver(methods.STREAM_TELEMETRY_RECORD, {"t": record})
        await streams.deliver(methods.STREAM_TELEMETRY_RECORD, {"t": record})

    with_streams(net, act, ack_timeout=1.0)


def test_where_streams_get_stuck_each_record_goes_by_itself(net):
    # The first record proves the call; the stream that follows it is one that somebody on the way holds back.
    net.faults.add("StreamTelemetryRecord", Fault())
    net.faults.add("StreamTelemetryRecord", Fault(delay=30))

    async def act(streams):
        def one(name):
            record = pb.TelemetryRecord(telemetry_id=name, client_id="c", key="k", payload='{"value": 1}')
            return streams.deliver(methods.STREAM_TELEMETRY_RECORD, {name: record.SerializeToString()})

        await one("a")
        with pytest.raises(CallError, match="no acknowledgement came"):
            await one("b")
        # Whatever would open a stream again would meet this.
        net.faults.add("StreamTelemetryRecord", Fault())
        net.faults.add("StreamTelemetryRecord", Fault())
        net.faults.add("StreamTelemetryRecord", Fault(delay=30))
        await one("b")
        await one("c")

    with_streams(net, act, ack_timeout=1.0)
    assert [event.record_id for event in net.events.of(TelemetryReceived)] == ["a", "b", "c"]


def test_many_at_once_share_a_stream(net):
    async def act(streams):
        def one(number):
            record = pb.TelemetryRecord(telemetry_id=str(number), client_id="c", key="k", payload='{"value": 1}')
            return streams.deliver(methods.STREAM_TELEMETRY_RECORD, {str(number): record.SerializeToString()})

        await asyncio.gather(*(one(number) for number in range(2_000)))

    with_streams(net, act)
    assert [event.record_id for event in net.events.of(TelemetryReceived)] == [str(n) for n in range(2_000)]


def test_ids_of_records_are_those_of_the_message_as_the_journal_has_it():
    message = pb.TelemetryMessage(client_id="c")
    message.timestamp.FromNanoseconds(10**18)
    for key, value in (("a", 1.0), ("b", float("nan"))):
        message.telemetries.add(key=key, value=value)
    packed = message.SerializeToString()
    first = records_of(Ticket(7, "task", MessageKind.TELEMETRY, packed))
    assert first == records_of(Ticket(7, "task", MessageKind.TELEMETRY, packed, stored=True))
    assert first.keys().isdisjoint(records_of(Ticket(8, "task", MessageKind.TELEMETRY, packed)))
    sent = [pb.TelemetryRecord.FromString(record) for record in first.values()]
    assert [(record.telemetry_id, json.loads(record.payload)["value"]) for record in sent] == [
        (number, value) for number, value in zip(first, (1.0, None), strict=True)
    ]


def backlog(net, accepts):
    return net.wait_for(lambda event: isinstance(event, BacklogReceived) and accepts(event), timeout=10)


def test_intervals_and_what_waits_are_told(net, monkeypatch):
    monkeypatch.setattr(vitals, "BACKLOG_INTERVAL", 0.05)
    net.faults.always("SendModelMetric", Fault(code=grpc.StatusCode.UNAVAILABLE))
    with RunningClient(net, run={"with_heartbeat": True}, heartbeat_interval=0.2) as edge:
        edge.runtime.send_metric({"loss": 1}, "m", 1, "r", "s")
        first = backlog(net, lambda event: event.backlog_total > 0)
        older = backlog(net, lambda event: event.backlog_total > 0 and event.oldest_age_ms > first.oldest_age_ms)
        net.faults.clear()
        # Before there was something, the age was None as well.
        backlog(net, lambda event: event.oldest_age_ms is None and event.monotonic > older.monotonic)
        net.wait_for(lambda event: isinstance(event, HeartbeatReceived) and event.interval_ms == 200, timeout=10)
        net.wait_for(lambda event: isinstance(event, PollReceived) and event.interval_ms == 100, timeout=10)


def test_a_server_that_takes_no_backlog_report_is_asked_once(old_net, monkeypatch, caplog):
    monkeypatch.setattr(vitals, "BACKLOG_INTERVAL", 0.02)
    caplog.set_level("INFO")
    with RunningClient(old_net):
        wait_until(lambda: "has no SendBacklogReport" in caplog.text, what="the refusal")
        polls = len(old_net.events.of(PollReceived))
        wait_until(lambda: len(old_net.events.of(PollReceived)) > polls + 2, what="more polls")
    assert caplog.text.count("SendBacklogReport") == 1
