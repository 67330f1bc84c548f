"""Tasks that a client starts by itself, against a network of either release."""

from __future__ import annotations

import functools
import os
import threading

import edge_callbacks as callbacks
import grpc
import pytest
from edge_running import RunningClient
from observing import wait_until

from scaleout_mp import CallbackNotSendable, EdgeClient
from scaleout_mp.errors import NotConnectedError
from scaleout_mp.localnet import Fault, LocalNetworkThread
from scaleout_mp.localnet.events import MetricReceived, TaskEnded, TaskReported


@pytest.fixture
def net(tmp_path):
    with LocalNetworkThread(tmp_path / "net") as network:
        yield network


def ended(net, task):
    event = net.wait_for(lambda e: isinstance(e, TaskEnded) and e.correlation_id == task.correlation_id, timeout=20)
    ends = net.events.of(TaskReported, lambda e: e.correlation_id == task.correlation_id and e.done)
    assert len(ends) == 1
    return event, ends[0]


def test_it_runs_in_a_process_of_its_own_and_the_server_hears_how_it_ended(net):
    with RunningClient(net) as edge:
        task = edge.client.start_autonomous_task(callbacks.look_around, "look", {"where": "around"})
        assert task.wait(20)
        event, report = ended(net, task)
        # A second one under the same name, and the prefix that is there already.
        again = edge.client.start_autonomous_task(callbacks.look_around, "Autonomous_look")
        ended(net, again)
    assert (task.command_type, task.status, task.done) == ("Autonomous_look", "COMPLETED", True)
    assert task.response == report.response
    assert task.response["seen"] == 1
    assert task.response["pid"] not in {os.getpid(), again.response["pid"]}
    assert (event.task_type, event.status) == ("Autonomous_look", "COMPLETED")
    assert len(net.events.of(MetricReceived, lambda event: "seen" in event.metrics)) == 2


def test_the_server_stops_it(net):
    with RunningClient(net) as edge:
        task = edge.client.start_autonomous_task(callbacks.wait_for_abort, "wait")
        net.wait_for(lambda event: isinstance(event, MetricReceived), timeout=20)
        assert (task.status, task.response) == ("RUNNING", None)
        wait_until(lambda: net.abort_task(task.correlation_id), what="the server's knowing of it")
        event, report = ended(net, task)
    assert (event.status, report.response["msg"]) == ("INTERRUPTED", "Aborted by server")
    assert task.wait(5)
    assert (task.status, task.response) == ("INTERRUPTED", report.response)


def test_a_failure_is_reported_and_what_cannot_be_sent_is_refused_at_once(net):
    with RunningClient(net) as edge:
        task = edge.client.start_autonomous_task(callbacks.raise_it, "fail")
        assert task.wait(20)
        assert (task.status, task.response["error"]) == ("FAILED", "raised ValueError: nothing to see")
        assert ended(net, task)[0].status == "FAILED"
        with pytest.raises(CallbackNotSendable):
            edge.client.start_autonomous_task(functools.partial(callbacks.look_around, threading.Lock()), "lock")
        with pytest.raises(TypeError, match="parameters"):
            edge.client.start_autonomous_task(callbacks.look_around, "look", {"x": object()})
        with pytest.raises(TypeError, match="callable"):
            edge.client.start_autonomous_task("look", "look")


def test_it_may_be_started_before_the_client_runs_and_ends_with_it(net):
    edge = RunningClient(net, callbacks=False)
    with pytest.raises(NotConnectedError):
        EdgeClient().start_autonomous_task(callbacks.look_around, "look")
    assert edge.client.init_grpchandler(edge.options)
    task = edge.client.start_autonomous_task(callbacks.wait_for_abort, "wait")
    assert (task.status, task.done) == ("PENDING", False)
    with edge:
        net.wait_for(lambda event: isinstance(event, MetricReceived), timeout=20)
    assert task.status == "INTERRUPTED"
    assert "shutting down" in ended(net, task)[1].response["msg"]


def test_an_outage_does_not_use_up_the_introductions(net):
    with RunningClient(net) as edge:
        net.faults.add("PollAndReportAsync", Fault(code=grpc.StatusCode.UNAVAILABLE), times=4)
        task = edge.client.start_autonomous_task(callbacks.look_around, "look")
        assert ended(net, task)[0].status == "COMPLETED"


def test_a_server_of_release_1_0_does_not_know_it_and_it_runs_all_the_same(tmp_path, caplog):
    with LocalNetworkThread(tmp_path / "old", release="1.0") as net:
        with RunningClient(net) as edge:
            task = edge.client.start_autonomous_task(callbacks.wait_for_abort, "wait")
            wait_until(lambda: "does not take notice" in caplog.text, seconds=20, what="the warning")
            assert task.status == "RUNNING"
            assert edge.runtime.abort_task(task.correlation_id)
            assert task.wait(10)
        assert task.status == "INTERRUPTED"
        ends = net.events.of(TaskReported, lambda event: event.done)
        assert [(event.status, event.known) for event in ends] == [("INTERRUPTED", False)]
