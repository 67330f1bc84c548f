"""The outbox and the retry policy, with calls that answer as they are told."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from scaleout_mp.errors import AuthenticationError, CallError, TransportError
from scaleout_mp.transport.backoff import Backoff
from scaleout_mp.transport.calls import CombinerCalls, is_transient, worth_retrying
from scaleout_mp.transport.lane import Pace
from scaleout_mp.transport.link import LinkWatch
from scaleout_mp.transport.message import MessageClass, MessageKind
from scaleout_mp.transport.outbox import Outbox
from scaleout_mp.transport.stock import Bound
from scaleout_mp.transport.transfer import serialize_chunk
from scaleout_mp.wire import edge_pb2 as pb

DOWN = CallError("SendModelMetric: UNAVAILABLE", code="UNAVAILABLE", transient=True)
REFUSED = CallError("SendModelMetric: INVALID_ARGUMENT", code="INVALID_ARGUMENT")


class FakeCalls(CombinerCalls):
    """The real retry logic over a link that is a list of errors."""

    def __init__(self, *failures):
        self.backoff = Backoff(first=1.0)
        self.link = LinkWatch()
        self._rand = lambda: 0.5
        self.failures = list(failures)
        self.arrived = []
        self.waits = []
        self.under_way = self.most_under_way = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def sleep(self, seconds):
        self.waits.append(seconds)
        await asyncio.sleep(0)

    def speaks(self, method):
        return False

    async def once(self, method, request, *, within=0.0):
        # What goes out first arrives first, as on one connection; answers come when the gate opens.
        error = self.failures.pop(0) if self.failures else None
        if error is None:
            message = method.request.FromString(request) if isinstance(request, bytes) else request
            self.arrived.append((method.name, message.model_id if hasattr(message, "model_id") else ""))
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await self.gate.wait()
        finally:
            self.under_way -= 1
        if error is not None:
            raise error
        return pb.Response()


QUICK = Backoff(first=0.001, jitter=0)


def box(calls, **options):
    """Return an outbox that takes the link for a slow one."""
    return Outbox(calls, **{"retries": QUICK, "pace": Pace(0.05), **options})


def metric(name):
    return MessageKind.METRIC, pb.ModelMetric(model_id=name)


def test_a_result_arrives_after_all_that_was_put_before_it_whatever_fails():
    async def scenario():
        calls = FakeCalls(None, DOWN, DOWN, None)
        outbox = box(calls)
        for name in "abc":
            outbox.put(*metric(name), task_id="t")
        update = outbox.put(MessageKind.UPDATE, pb.ModelUpdate(model_id="u"), task_id="t")
        await update.delivered()
        await outbox.flush("t")
        return calls, outbox.counts

    calls, counts = asyncio.run(scenario())
    # What failed while others were under way comes late; the update comes last all the same.
    assert sorted(calls.arrived[:3]) == [("SendModelMetric", name) for name in "abc"]
    assert calls.arrived[3:] == [("SendModelUpdate", "u")]
    assert (counts.pending, counts.delivered, counts.refused) == (0, 4, 0)


def test_a_message_that_is_refused_for_good_does_not_hold_up_the_others(caplog):
    async def scenario():
        calls = FakeCalls(REFUSED)
        outbox = box(calls)
        update = outbox.put(MessageKind.UPDATE, pb.ModelUpdate(), task_id="t")
        after = outbox.put(*metric("a"), task_id="t")
        with pytest.raises(CallError, match="INVALID_ARGUMENT"):
            await update.delivered()
        await after.delivered()
        return outbox.counts

    counts = asyncio.run(scenario())
    assert (counts.delivered, counts.refused) == (1, 1)
    assert "refused a message" in caplog.text


BUG = CallError("SendModelMetric: UNKNOWN", code="UNKNOWN")


def test_what_may_be_a_bug_of_the_servers_gets_a_few_more_tries(caplog):
    async def scenario(*failures):
        calls = FakeCalls(*failures)
        outbox = box(calls)
        update = outbox.put(MessageKind.UPDATE, pb.ModelUpdate(model_id="u"), task_id="t")
        metrics = [outbox.put(*metric(name), task_id="t") for name in "abc"]
        await outbox.flush("t")
        assert not calls.link.down
        return update.arrived, [ticket.arrived for ticket in metrics], outbox.counts, len(calls.failures)

    assert asyncio.run(scenario(BUG, BUG, None, BUG))[:2] == (True, [True] * 3)
    caplog.clear()
    # A server that never takes it does not hold up the task: each of the others gets one try.
    arrived, others, counts, left = asyncio.run(scenario(*[BUG] * 100))
    assert (arrived, others, counts.refused, left) == (False, [False] * 3, 4, 100 - 9 - 3)
    # Of the records, the first.
    assert [r.message for r in caplog.records if r.levelname == "ERROR"].count(
        "the combiner refused a message for good: SendModelMetric: UNKNOWN"
    ) == 2


def test_a_refused_token_is_waited_out():
    async def scenario():
        calls = FakeCalls(AuthenticationError("spent"), TransportError("the API does not answer"))
        ticket = box(calls).put(*metric("a"))
        await ticket.delivered()
        return calls

    assert asyncio.run(scenario()).arrived == [("SendModelMetric", "a")]


def test_a_task_that_waits_for_the_link_does_not_block_the_others():
    async def scenario():
        calls = FakeCalls(DOWN)
        outbox = box(calls, under_way=1, retries=Backoff(first=0.05, jitter=0))
        first = outbox.put(*metric("a"), task_id="one")
        await outbox.put(*metric("b"), task_id="two").delivered()
        assert not first.settled
        await first.delivered()
        return calls.arrived

    assert asyncio.run(scenario()) == [("SendModelMetric", "b"), ("SendModelMetric", "a")]


def test_records_go_out_together_in_order_and_a_result_goes_alone():
    async def scenario():
        calls = FakeCalls()
        outbox = box(calls)
        calls.gate.clear()
        for step in range(2000):
            outbox.put(*metric(str(step)), task_id="t")
        update = outbox.put(MessageKind.UPDATE, pb.ModelUpdate(model_id="u"), task_id="t")
        after = outbox.put(*metric("after"), task_id="t")
        await asyncio.sleep(0.01)
        assert calls.under_way == 64
        calls.gate.set()
        await after.delivered()
        assert update.arrived
        return calls

    calls = asyncio.run(scenario())
    assert calls.most_under_way == 64
    assert [name for _, name in calls.arrived] == [*map(str, range(2000)), "u", "after"]


def test_records_go_one_by_one_while_that_keeps_up():
    async def scenario():
        calls = FakeCalls()
        outbox = box(calls, pace=Pace(0.005))
        for step in range(12):
            outbox.put(*metric(str(step)), task_id="t")
        assert await outbox.drain(5)
        return calls

    calls = asyncio.run(scenario())
    assert calls.most_under_way == 1
    assert [name for _, name in calls.arrived] == [*map(str, range(12))]


def test_a_link_that_fails_gets_one_call_at_a_time_and_then_more():
    async def scenario():
        calls = FakeCalls(*[DOWN] * 64)
        outbox = box(calls)
        calls.gate.clear()
        for step in range(1000):
            outbox.put(*metric(str(step)), task_id="t")
        await asyncio.sleep(0.01)
        assert calls.under_way == 64
        calls.gate.set()
        await asyncio.sleep(0)
        # All of them have failed, and that is one failure.
        calls.gate.clear()
        calls.most_under_way = 0
        await asyncio.sleep(0.01)
        assert calls.most_under_way == 1
        calls.gate.set()
        assert await outbox.drain(10)
        return calls

    calls = asyncio.run(scenario())
    assert [name for _, name in calls.arrived] == [str(step) for step in range(1000)]


def test_results_go_before_metrics_and_metrics_before_telemetry():
    async def scenario():
        calls = FakeCalls()
        outbox = box(calls, under_way=2)
        calls.gate.clear()
        for task in ("one", "two"):
            outbox.put(MessageKind.TELEMETRY, pb.TelemetryMessage(), task_id=task)
        await asyncio.sleep(0.01)
        assert calls.under_way == 2
        outbox.put(MessageKind.TELEMETRY, pb.TelemetryMessage())
        outbox.put(*metric("m"), task_id="metrics")
        outbox.put(MessageKind.UPDATE, pb.ModelUpdate(model_id="u"), task_id="update")
        await asyncio.sleep(0.01)
        # For results there is always room.
        assert calls.under_way == 3
        calls.gate.set()
        assert await outbox.drain(5)
        return [name for name, _ in calls.arrived]

    assert asyncio.run(scenario()) == [
        *["SendTelemetryMessage"] * 2,
        "SendModelUpdate",
        "SendModelMetric",
        "SendTelemetryMessage",
    ]


def test_records_beyond_the_bound_are_dropped_and_counted(caplog):
    async def scenario():
        calls = FakeCalls()
        calls.gate.clear()
        outbox = box(calls, bounds={MessageClass.METRIC: Bound(records=2, bytes=1 << 20)})
        tickets = [outbox.put(*metric(str(n)), task_id="t") for n in range(4)]
        kept = outbox.put(MessageKind.UPDATE, pb.ModelUpdate(), task_id="t")
        with pytest.raises(TransportError, match="full"):
            await tickets[3].delivered()
        assert outbox.counts.pending == 3
        calls.gate.set()
        await kept.delivered()
        assert await outbox.drain(1)
        return outbox.counts

    counts = asyncio.run(scenario())
    assert (counts.delivered, counts.dropped) == (3, 2)
    assert len([record for record in caplog.records if "dropped" in record.getMessage()]) == 1


def test_a_long_burst_waits_for_the_link_and_arrives_whole_and_in_order():
    async def scenario():
        calls = FakeCalls()
        calls.gate.clear()
        outbox = box(calls)
        for step in range(120_000):
            outbox.put(*metric(str(step)), task_id="t")
        calls.gate.set()
        assert await outbox.drain(60)
        return calls, outbox.counts

    calls, counts = asyncio.run(scenario())
    assert (counts.delivered, counts.dropped) == (120_000, 0)
    assert [name for _, name in calls.arrived] == [str(step) for step in range(120_000)]


def test_records_are_bounded_by_their_bytes_as_well():
    async def scenario():
        calls = FakeCalls()
        outbox = box(calls, bounds={MessageClass.METRIC: Bound(records=9, bytes=250)})
        tickets = [outbox.put(*metric("x" * 100), task_id="t") for _ in range(4)]
        assert [ticket.refused for ticket in tickets] == [False, False, True, True]
        assert await outbox.drain(1)
        await outbox.put(*metric("x" * 100)).delivered()
        return outbox.counts

    counts = asyncio.run(scenario())
    assert (counts.delivered, counts.dropped) == (3, 2)


def test_a_bug_with_one_message_settles_it_and_the_others_go_on(caplog):
    async def scenario():
        outbox = box(FakeCalls(RuntimeError("odd")))
        odd = outbox.put(*metric("a"), task_id="t")
        await outbox.put(*metric("b"), task_id="t").delivered()
        with pytest.raises(TransportError, match="RuntimeError: odd"):
            await odd.delivered()
        return outbox.counts

    counts = asyncio.run(scenario())
    assert (counts.pending, counts.delivered, counts.refused) == (0, 1, 1)
    assert "in the client itself" in caplog.text


def test_records_can_be_given_up_and_results_stay():
    async def scenario():
        calls = FakeCalls()
        calls.gate.clear()
        outbox = box(calls)
        first = outbox.put(*metric("a"), task_id="t")
        outbox.put(*metric("b"), task_id="t")
        update = outbox.put(MessageKind.UPDATE, pb.ModelUpdate(model_id="u"), task_id="t")
        other = outbox.put(*metric("c"), task_id="other")
        await asyncio.sleep(0)
        assert first.tried
        assert not update.tried
        assert outbox.waiting("t") == 3
        assert outbox.give_up_records("t") == 2
        assert outbox.waiting("t") == 1
        calls.gate.set()
        await update.delivered()
        await other.delivered()
        assert await outbox.drain(1)
        return outbox.counts

    counts = asyncio.run(scenario())
    assert (counts.pending, counts.delivered, counts.dropped, counts.refused) == (0, 2, 2, 0)


def test_closing_says_what_is_lost_and_wakes_who_waits(caplog):
    async def scenario():
        calls = FakeCalls()
        calls.gate.clear()
        outbox = box(calls)
        ticket = outbox.put(*metric("a"), task_id="t")
        waiting = asyncio.create_task(ticket.delivered())
        assert not await outbox.drain(0.01)
        await outbox.aclose()
        with pytest.raises(TransportError, match="ended"):
            await waiting
        assert outbox.counts.pending == 1

    asyncio.run(scenario())
    assert "1 messages did not reach" in caplog.text


def test_an_outage_is_one_warning_and_its_end_one_line(caplog):
    now = [0.0]
    link = LinkWatch(lambda: now[0])
    with caplog.at_level("DEBUG"):
        link.succeeded()
        for _ in range(3):
            link.failed("polling", DOWN, 1.0)
            now[0] += 2.5
        assert link.down
        link.succeeded()
    assert [record.levelname for record in caplog.records] == ["WARNING", "DEBUG", "DEBUG", "INFO"]
    assert "7.5 s" in caplog.text
    assert not link.down


def test_one_call_that_fails_again_and_again_is_one_warning_a_minute(caplog):
    now = [0.0]
    link = LinkWatch(lambda: now[0])
    with caplog.at_level("DEBUG"):
        for _ in range(13):
            link.failed("SendStatus", DOWN, 5.0)
            link.succeeded()
            now[0] += 5
        link.failed("polling", DOWN, 5.0)
    levels = [record.levelname for record in caplog.records]
    assert (levels.count("WARNING"), levels.count("INFO"), levels[-1]) == (3, 2, "WARNING")


@pytest.mark.parametrize(
    ("code", "details", "transient"),
    [
        ("UNAVAILABLE", "", True),
        ("RESOURCE_EXHAUSTED", "", True),
        ("RESOURCE_EXHAUSTED", "CLIENT: Received message larger than max (5242880 vs. 4194304)", False),
        ("RESOURCE_EXHAUSTED", "gRPC message exceeds maximum size 4194304: 5242880", False),
        ("DEADLINE_EXCEEDED", "", True),
        ("CANCELLED", "", True),
        ("FAILED_PRECONDITION", "", True),
        ("UNKNOWN", "Stream removed", True),
        ("UNKNOWN", "Exception calling application", False),
        ("INTERNAL", "Received RST_STREAM with error code 2", True),
        ("INTERNAL", "bug", False),
        ("INVALID_ARGUMENT", "", False),
        ("NOT_FOUND", "", False),
        ("UNIMPLEMENTED", "", False),
        ("UNIMPLEMENTED", "Received http2 header with status: 404", True),
        ("UNKNOWN", "Received http2 header with status: 500", True),
        ("PERMISSION_DENIED", "Received http2 header with status: 403", False),
        ("PERMISSION_DENIED", "", False),
    ],
)
def test_which_failures_may_pass(code, details, transient):
    assert is_transient(grpc.StatusCode[code], details) is transient


def test_what_is_worth_another_try():
    assert worth_retrying(DOWN)
    assert not worth_retrying(REFUSED)
    assert not worth_retrying(AuthenticationError())
    assert worth_retrying(TransportError("the API does not answer"))


def test_retries_end_with_the_last_error():
    async def scenario(attempts, *failures):
        calls = FakeCalls(*failures)
        await calls.call(MessageKind.METRIC.value, pb.ModelMetric(), attempts=attempts)
        return calls.waits

    assert asyncio.run(scenario(3, DOWN, DOWN)) == [1.0, 2.0]
    assert len(asyncio.run(scenario(None, *[DOWN] * 40))) == 40
    for attempts, failures in ((2, (DOWN, DOWN)), (None, (REFUSED,))):
        with pytest.raises(CallError):
            asyncio.run(scenario(attempts, *failures))


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 1 << 20, (1 << 21) + 5])
def test_chunks_are_written_as_protobuf_writes_them(size):
    data = bytes(size)
    parsed = pb.FileChunk.FromString(serialize_chunk(memoryview(data)))
    assert parsed.data == data
    if size:
        assert serialize_chunk(data) == pb.FileChunk(data=data).SerializeToString()
