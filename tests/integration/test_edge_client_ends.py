"""How tasks end in odd moments: too much to say, a link that does not take it, a client that is told to end."""

from __future__ import annotations

import time

import edge_callbacks as callbacks
import grpc
import numpy as np
import pytest
from edge_running import POLLING, RunningClient
from observing import wait_until

from scaleout_mp import Limits, ScaleoutModel
from scaleout_mp.config import Settings
from scaleout_mp.localnet import Fault, LocalNetworkThread
from scaleout_mp.localnet.events import ClientDisconnected, MetricReceived, PollReceived, TaskReported, UpdateReceived
from scaleout_mp.transport.message import MessageClass
from scaleout_mp.transport.stock import BOUNDS, Bound

TOO_LARGE = Fault(
    code=grpc.StatusCode.RESOURCE_EXHAUSTED, details="SERVER: Received message larger than max (5242880 vs. 4194304)"
)
UNAVAILABLE = Fault(code=grpc.StatusCode.UNAVAILABLE)


@pytest.fixture
def net(tmp_path):
    with LocalNetworkThread(tmp_path / "net") as network:
        yield network


@pytest.fixture
def model_id(net):
    with ScaleoutModel.from_training_model([np.zeros(3, np.float32)]) as model:
        return net.add_model(model)


def ends(net, task):
    """The terminal reports of a task."""
    return net.events.of(TaskReported, lambda event: event.correlation_id == task.correlation_id and event.done)


def one_end(net, task, timeout=15):
    task.done(timeout)
    (end,) = ends(net, task)
    return end


def wait_for_phase(edge, phase):
    wait_until(lambda: phase in {task.phase for task in edge.runtime.snapshot().tasks}, seconds=10, what=phase)


def test_a_result_that_no_server_takes_is_one_failed_report_and_the_client_goes_on(net, model_id):
    with RunningClient(net, max_concurrent_tasks=1) as edge:
        edge.client.set_custom_callback("megabytes", callbacks.returns_megabytes)
        edge.client.set_custom_callback("answer", callbacks.answer)
        edge.client.set_validate_callback(callbacks.validate_with_megabytes)
        custom, validation = edge.issue("Custom_megabytes"), edge.issue("Scaleout_Validation", model_id=model_id)
        for task, what in ((custom, "result"), (validation, "metrics")):
            end = one_end(net, task)
            assert end.status == "FAILED"
            assert f"returned {what} of 52428" in end.response["error"]
        # What is small enough for us may still be too much for a server.
        edge.client.set_validate_callback(callbacks.validate)
        net.faults.add("SendModelValidation", TOO_LARGE)
        end = one_end(net, edge.issue("Scaleout_Validation", model_id=model_id))
        assert end.status == "FAILED"
        assert "larger than max" in end.response["error"]
        assert one_end(net, edge.issue("Custom_answer")).status == "COMPLETED"
    assert net.events.largest_gap(PollReceived, edge.id) < POLLING + 0.2


def test_a_result_that_waits_for_the_link_holds_up_no_other_task_and_is_not_interrupted(net, model_id):
    net.faults.add("SendModelUpdate", UNAVAILABLE, times=1000)
    with RunningClient(net, max_concurrent_tasks=1) as edge:
        edge.client.set_train_callback(callbacks.train)
        edge.client.set_custom_callback("answer", callbacks.answer)
        task = edge.issue(model_id=model_id)
        wait_for_phase(edge, "reporting")
        assert one_end(net, edge.issue("Custom_answer")).status == "COMPLETED"
        task.abort()
        polls = len(net.events.of(PollReceived))
        wait_until(lambda: len(net.events.of(PollReceived)) > polls + 2, what="the abort to arrive")
        assert ends(net, task) == []
        net.faults.clear()
        net.wait_for(lambda event: isinstance(event, UpdateReceived), timeout=20)
        wait_until(lambda: ends(net, task), seconds=10, what="the end")
    assert {end.status for end in ends(net, task)} == {"COMPLETED"}


def test_an_update_that_went_out_is_never_reported_as_interrupted(net, model_id):
    # It arrives each time, and each time the answer gets lost.
    net.faults.add("SendModelUpdate", Fault(code=grpc.StatusCode.UNAVAILABLE, after=True), times=1000)
    with RunningClient(net) as edge:
        edge.client.set_train_callback(callbacks.train)
        task = edge.issue(model_id=model_id)
        net.wait_for(lambda event: isinstance(event, UpdateReceived), timeout=10)
        before = time.monotonic()
        edge.runtime.stop()
        edge._thread.join(20)
        # abort_grace and its margin are for tasks at work; what is on its way has the last words' time.
        assert time.monotonic() - before < 5.5
    assert ends(net, task) == []
    (goodbye,) = net.events.of(ClientDisconnected)
    assert not goodbye.lost


def test_records_that_cannot_be_sent_do_not_cost_the_end_and_the_goodbye(net):
    with RunningClient(net) as edge:
        edge.client.set_custom_callback("pulse", callbacks.Worker(edge.client).pulse)
        net.faults.add("SendModelMetric", UNAVAILABLE, times=1000)
        task = edge.issue("Custom_pulse", parameters={})
        wait_for_phase(edge, "reporting")
        edge.runtime.stop()
        edge._thread.join(20)
    assert [end.status for end in ends(net, task)] == ["COMPLETED"]
    assert [event.lost for event in net.events.of(ClientDisconnected)] == [False]


def test_a_task_that_comes_with_the_very_last_poll_is_reported(net):
    settings = Settings(polling_interval=3.0, send_telemetry=False)
    with RunningClient(net, settings=settings, limits=Limits(abort_grace=0.3)) as edge:
        edge.client.set_custom_callback("answer", callbacks.answer)
        edge.client.set_custom_callback("ignores", callbacks.Worker(edge.client).wait_for_abort)
        net.wait_for(lambda event: isinstance(event, PollReceived), timeout=10)
        first = edge.issue("Custom_ignores")
        wait_until(lambda: edge.runtime.snapshot().tasks, seconds=10, what="the first task")
        last = edge.issue("Custom_answer")
    for task in (first, last):
        assert len(ends(net, task)) == 1
    (goodbye,) = net.events.of(ClientDisconnected)
    assert goodbye.monotonic > max(ends(net, first)[0].monotonic, ends(net, last)[0].monotonic)


def test_a_poll_under_way_when_the_client_ends_loses_no_task(net):
    with RunningClient(net) as edge:
        edge.client.set_custom_callback("answer", callbacks.answer)
        net.faults.add("PollAndReportAsync", Fault(delay=0.5))
        wait_until(lambda: not net.network.faults._planned["PollAndReportAsync"], what="the slow poll")
        task = edge.issue("Custom_answer")
    (end,) = ends(net, task)
    assert end.status in {"COMPLETED", "INTERRUPTED"}


def test_a_burst_of_metrics_before_a_sigkill_arrives_whole(net):
    count = 15_000
    with RunningClient(net) as edge:
        edge.client.set_custom_callback("burst", callbacks.Worker(edge.client).log_many_then_die)
        end = one_end(net, edge.issue("Custom_burst", parameters={"count": count}), timeout=100)
    # Of calls that are under way together, a server may take a later one first.
    in_order = sorted(net.events.of(MetricReceived), key=lambda event: event.timestamp)
    assert [event.step for event in in_order] == list(range(count))
    assert "dropped_records" not in end.response
    assert end.response["report"]["last_step"] == count - 1
    # Client and server share one interpreter here, and both are busy for many seconds: polls do not wait for that.
    assert net.events.largest_gap(PollReceived, edge.id) < POLLING + 1.5


def test_records_beyond_the_outbox_are_counted_in_the_end(net, monkeypatch):
    monkeypatch.setitem(BOUNDS, MessageClass.METRIC, Bound(records=10, bytes=1 << 20))
    net.faults.add("SendModelMetric", UNAVAILABLE, times=2)
    with RunningClient(net) as edge:
        edge.client.set_custom_callback("burst", callbacks.Worker(edge.client).log_many_then_die)
        end = one_end(net, edge.issue("Custom_burst", parameters={"count": 50}))
    arrived = len(net.events.of(MetricReceived))
    assert arrived >= 10
    assert end.response["dropped_records"] == 50 - arrived


def test_a_context_of_the_users_own_is_sent_as_it_is(net):
    with RunningClient(net) as edge:
        edge.client.set_custom_callback("own", callbacks.Worker(edge.client).log_in_own_context)
        one_end(net, net.issue(edge.id, "Custom_own", model_id="m"))
    seen = {name: (event.model_id, event.step) for event in net.events.of(MetricReceived) for name in event.metrics}
    assert seen == {"a": ("own", 5), "b": ("m", 0)}
