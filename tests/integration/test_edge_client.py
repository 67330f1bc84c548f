"""The edge client against the local network: sessions, failures, aborts."""

from __future__ import annotations

import time

import edge_callbacks as callbacks
import numpy as np
import programs
import pytest
from edge_running import POLLING, RunningClient
from observing import wait_until

from scaleout_mp import Limits, ScaleoutModel
from scaleout_mp.localnet import Fault, LocalNetworkThread, RunStatus, SessionPlan
from scaleout_mp.localnet.events import (
    AttributeReceived,
    ClientDisconnected,
    HeartbeatReceived,
    MetricReceived,
    PollReceived,
    StatusReceived,
    TaskReported,
    TelemetryReceived,
    UpdateReceived,
    ValidationReceived,
)


@pytest.fixture
def net(tmp_path):
    with LocalNetworkThread(tmp_path / "net") as network:
        yield network


@pytest.fixture
def model_id(net):
    with ScaleoutModel.from_training_model([np.zeros((3, 3), np.float32)]) as model:
        return net.add_model(model)


def ends(net, correlation_id):
    """The terminal reports of a task."""
    return net.events.of(TaskReported, lambda event: event.correlation_id == correlation_id and event.done)


def wait_for_metric(net, key):
    net.wait_for(lambda event: isinstance(event, MetricReceived) and key in event.metrics, timeout=10)


def one_end(net, task, timeout=15):
    """Wait for the end of a task and return its only terminal report."""
    task.done(timeout)
    (end,) = ends(net, task.correlation_id)
    return end


def test_a_session_trains_and_everything_arrives_in_order_with_the_right_ids(net):
    with RunningClient(net, run={"with_heartbeat": True}, heartbeat_interval=0.2) as edge:
        worker = callbacks.Worker(edge.client)
        edge.client.set_train_callback(worker.train)
        edge.client.set_validate_callback(worker.validate)
        with ScaleoutModel.from_training_model([np.zeros((3, 3), np.float32)]) as seed:
            plan = SessionPlan(rounds=2, client_settings={"epochs": 3})
            result = net.run_session(plan, seed, timeout=30)

    assert result.status is RunStatus.FINISHED
    with net.open_model(result.model_id) as trained:
        assert np.array_equal(trained.get_training_model()[0], np.full((3, 3), 2.0))
    assert [round_.metrics for round_ in result.rounds] == [
        {"accuracy": 0.5, "mean": 1.0},
        {"accuracy": 0.5, "mean": 2.0},
    ]
    updates = net.events.of(UpdateReceived)
    assert [update.meta["training_metadata"]["num_examples"] for update in updates] == [7, 7]
    assert len({update.meta["pid"] for update in updates}) == 2
    for update in updates:
        assert {"processing_time", "upload_model", "fetch_model", "config"} <= set(update.meta)
    losses = net.events.of(MetricReceived, lambda event: "loss" in event.metrics)
    assert [(event.step, event.model_id, event.round_id, event.session_id) for event in losses] == [
        (step, update.model_id, update.round_id, result.session_id) for update in updates for step in range(3)
    ]
    seen = net.events.of(MetricReceived, lambda event: "seen" in event.metrics)
    assert [(event.step, event.model_id) for event in seen] == [
        (9, validation.model_id) for validation in net.events.of(ValidationReceived)
    ]
    assert len(net.events.of(AttributeReceived)) == len(net.events.of(TelemetryReceived)) == 2
    kinds = (MetricReceived, AttributeReceived, TelemetryReceived, UpdateReceived, TaskReported)
    first = updates[0]
    order = [
        type(event)
        for event in net.events.all()
        if isinstance(event, kinds)
        and event.monotonic <= ends(net, first.correlation_id)[0].monotonic
        and getattr(event, "done", True)
    ]
    assert order == [MetricReceived] * 3 + [AttributeReceived, TelemetryReceived, UpdateReceived, TaskReported]
    for correlation_id in {event.correlation_id for event in net.events.of(TaskReported)}:
        assert [end.status for end in ends(net, correlation_id)] == ["COMPLETED"]
    levels = [(event.level, event.status_type) for event in net.events.of(StatusReceived)]
    one_round = [
        ("INFO", "MODEL_UPDATE"),
        ("AUDIT", "MODEL_UPDATE"),
        ("INFO", "MODEL_VALIDATION"),
        ("AUDIT", "MODEL_VALIDATION"),
    ]
    assert levels == one_round * 2
    assert net.events.largest_gap(PollReceived, edge.id) < POLLING + 0.2
    assert net.events.largest_gap(HeartbeatReceived, edge.id) < 0.4
    assert [event.lost for event in net.events.of(ClientDisconnected)] == [False]


@pytest.mark.parametrize(
    ("callback", "reason", "says"),
    [
        (callbacks.raises, "failed", "the learning rate is negative"),
        (callbacks.returns_nothing, "failed", "returned None; it must return a tuple"),
        (callbacks.segfaults, "crashed", "SIGSEGV"),
        (callbacks.exits, "crashed", "exited with code 0"),
        (callbacks.allocates, "memory_limit", "memory limit"),
    ],
)
def test_a_callback_that_goes_wrong_is_one_failed_report_and_the_client_goes_on(net, model_id, callback, reason, says):
    with RunningClient(net, limits=Limits(memory="300MiB", abort_grace=0.5)) as edge:
        edge.client.set_train_callback(callback)
        end = one_end(net, edge.issue(model_id=model_id))
        edge.client.set_train_callback(callbacks.train)
        assert one_end(net, edge.issue(model_id=model_id)).status == "COMPLETED"

    assert end.status == "FAILED"
    assert end.response["reason"] == reason
    assert says in end.response["error"]
    assert "\n" not in end.response["error"]
    report = end.response["report"]
    assert report["reason"] == reason
    assert report["wall_seconds"] > 0
    if reason == "memory_limit":
        assert report["memory_limit"] == 300 << 20
        assert report["peak_memory"] >= 300 << 20
    if callback is callbacks.raises:
        assert report["error_type"] == "ValueError"
        assert "in raises" in report["traceback"]
    (status,) = net.events.of(StatusReceived, lambda event: event.level == "ERROR")
    assert status.status_type == "MODEL_UPDATE"
    assert says in status.status


def test_metrics_logged_just_before_a_sigkill_arrive_before_the_report(net, model_id):
    with RunningClient(net) as edge:
        edge.client.set_train_callback(callbacks.Worker(edge.client).log_then_die)
        end = one_end(net, edge.issue(model_id=model_id))
    metrics = net.events.of(MetricReceived)
    assert [event.step for event in metrics] == list(range(50))
    assert all(event.model_id == model_id and event.monotonic <= end.monotonic for event in metrics)
    assert (end.response["report"]["signal"], end.response["report"]["last_step"]) == ("SIGKILL", 49)


def test_tasks_that_cannot_be_served_say_why(net, model_id):
    with RunningClient(net) as edge:
        edge.client.set_train_callback(callbacks.train)
        edge.client.set_custom_callback("pulse", callbacks.Worker(edge.client).pulse)
        for task, says in (
            (edge.issue("Scaleout_Validation", model_id=model_id), "no validate callback"),
            (edge.issue("Custom_other"), "no custom callback for Custom_other"),
            (edge.issue("Scaleout_Dance"), "does not know tasks of type"),
            (edge.issue(model_id="no-such-model"), "does not have model no-such-model"),
            (edge.issue(), "without a model id"),
            (edge.issue("Custom_pulse", parameters=[1]), "not an object"),
        ):
            end = one_end(net, task)
            assert end.status == "FAILED"
            assert says in end.response["error"]


def test_a_custom_callback_gets_parameters_and_answers_in_the_report(net):
    with RunningClient(net) as edge:
        edge.client.set_custom_callback("pulse", callbacks.Worker(edge.client).pulse)
        end = one_end(net, edge.issue("Custom_pulse", parameters={"x": [1, 2]}))
    assert end.response == {"got": {"x": [1, 2]}, "client": "edge"}
    assert [event.metrics for event in net.events.of(MetricReceived)] == [{"custom": 1.0}]


@pytest.mark.parametrize(("status", "says"), [("INTERRUPTED", "Aborted by server"), ("TIMEOUT", "Timed out by server")])
def test_the_server_aborts_a_running_task(net, model_id, status, says):
    with RunningClient(net) as edge:
        edge.client.set_train_callback(callbacks.Worker(edge.client).wait_for_abort)
        task = edge.issue(model_id=model_id)
        wait_for_metric(net, "ready")
        assert task.abort(status=status)
        end = one_end(net, task)
    assert (end.status, end.response["msg"]) == ("INTERRUPTED", says)
    assert end.response["report"]["stopped_by"] == "abort"
    assert len(net.events.of(MetricReceived, lambda event: "cleaned up" in event.metrics)) == 1


def test_a_task_that_ignores_the_abort_is_gone_in_time(net, model_id):
    with RunningClient(net) as edge:
        edge.client.set_train_callback(callbacks.Worker(edge.client).ignore_abort)
        task = edge.issue(model_id=model_id)
        wait_for_metric(net, "ready")
        before = time.monotonic()
        task.abort()
        end = one_end(net, task)
    assert end.status == "INTERRUPTED"
    assert end.response["reason"] == "interrupted_by_server"
    assert end.response["report"]["message"] == "Aborted by server; killed with SIGKILL"
    assert end.response["report"]["signal"] == "SIGKILL"
    assert time.monotonic() - before < 0.5 + 1 + 2 * POLLING


@pytest.mark.parametrize(("method", "phase"), [("Download", "downloading"), ("Upload", "uploading")])
def test_an_abort_during_a_transfer(net, model_id, method, phase):
    net.faults.add(method, Fault(delay=30))
    with RunningClient(net) as edge:
        edge.client.set_train_callback(callbacks.train)
        task = edge.issue(model_id=model_id)
        wait_until(lambda: [task.phase for task in edge.runtime.snapshot().tasks] == [phase], seconds=10, what=phase)
        task.abort()
        end = one_end(net, task, timeout=5)
    assert (end.status, end.response) == ("INTERRUPTED", {"msg": "Aborted by server"})
    assert net.events.of(UpdateReceived) == []


def test_an_abort_of_a_task_that_waits_for_its_turn(net, model_id):
    with RunningClient(net, max_concurrent_tasks=1) as edge:
        edge.client.set_train_callback(callbacks.Worker(edge.client).wait_for_abort)
        running = edge.issue(model_id=model_id)
        wait_for_metric(net, "ready")
        waiting = edge.issue(model_id=model_id)
        net.wait_for(
            lambda event: (
                isinstance(event, TaskReported)
                and (event.correlation_id, event.status) == (waiting.correlation_id, "PENDING")
            ),
            timeout=5,
        )
        waiting.abort()
        assert one_end(net, waiting).status == "INTERRUPTED"
        assert ends(net, running.correlation_id) == []
        assert [task.process_state for task in edge.runtime.snapshot().tasks] == ["running"]
        assert edge.runtime.abort_task(running.correlation_id)
        end = one_end(net, running)
    assert (end.status, end.response["msg"]) == ("INTERRUPTED", "Aborted by client")


def test_stopping_the_client_reports_what_ran_before_it_says_goodbye(net, model_id):
    with RunningClient(net) as edge:
        edge.client.set_train_callback(callbacks.Worker(edge.client).wait_for_abort)
        task = edge.issue(model_id=model_id)
        wait_for_metric(net, "ready")
    (end,) = ends(net, task.correlation_id)
    assert end.status == "INTERRUPTED"
    assert "shutting down" in end.response["msg"]
    (goodbye,) = net.events.of(ClientDisconnected)
    assert not goodbye.lost
    assert goodbye.monotonic > end.monotonic


def test_a_live_view_sees_task_memory_and_metrics(net, model_id):
    with RunningClient(net, limits=Limits(memory="1GiB", abort_grace=0.5)) as edge:
        edge.client.set_train_callback(callbacks.Worker(edge.client).wait_for_abort)
        task = edge.issue(model_id=model_id)

        def look():
            (seen,) = edge.runtime.snapshot().tasks or (None,)
            return seen if seen is not None and seen.last_metrics and seen.memory_now else None

        seen = wait_until(look, seconds=10, what="a task with memory and metrics")
        assert edge.runtime.snapshot().connected
    assert seen.correlation_id == task.correlation_id
    assert (seen.type, seen.phase, seen.model_id) == ("Scaleout_ModelUpdate", "running", model_id)
    assert (seen.memory_limit, seen.last_metrics, seen.last_step) == (1 << 30, {"ready": 1.0}, 0)


def test_polls_and_heartbeats_are_on_time_while_a_callback_holds_the_interpreter(net, model_id):
    with RunningClient(net, run={"with_heartbeat": True}, heartbeat_interval=0.2) as edge:
        edge.client.set_train_callback(callbacks.Worker(edge.client).hold_gil)
        assert one_end(net, edge.issue(model_id=model_id, settings={"seconds": 1})).status == "COMPLETED"
    assert net.events.largest_gap(PollReceived, edge.id) < POLLING + 0.2
    assert net.events.largest_gap(HeartbeatReceived, edge.id) < 0.2 + 0.2


@pytest.mark.parametrize(
    ("program", "reason", "says"),
    [
        (programs.segfault, "crashed", "SIGSEGV"),
        (programs.exit_zero, "crashed", "exited with code 0 before it returned a result"),
        (programs.kill_self, "crashed", "SIGKILL"),
        (programs.system_exit, "failed", "SystemExit"),
        (programs.raise_base_exception, "failed", "BaseException: out of everything"),
        (programs.allocate, "memory_limit", "limit of 256 MiB"),
        (programs.spin, "wall_time", "wall-clock limit of 0.8 s"),
    ],
)
def test_polls_and_heartbeats_are_on_time_whatever_a_callback_does(net, model_id, program, reason, says):
    # Only who spins runs into it: on a busy machine the others may take longer than that to get where they end.
    wall_time = 0.8 if reason == "wall_time" else None
    limits = Limits(memory="256MiB", wall_time=wall_time, abort_grace=0.4)
    with RunningClient(net, run={"with_heartbeat": True}, heartbeat_interval=0.2, limits=limits) as edge:
        edge.client.set_train_callback(lambda _model, _settings: program())
        report = one_end(net, edge.issue(model_id=model_id))
        assert report.status == "FAILED"
        assert report.response["reason"] == reason
        assert says in report.response["error"]
        # The client goes on as before.
        edge.client.set_train_callback(callbacks.train)
        assert one_end(net, edge.issue(model_id=model_id)).status == "COMPLETED"
    assert net.events.largest_gap(PollReceived, edge.id) < POLLING + 0.2
    assert net.events.largest_gap(HeartbeatReceived, edge.id) < 0.2 + 0.2


def test_tasks_come_by_the_task_stream_as_well(net, model_id):
    with RunningClient(net, run={"with_polling": False}) as edge:
        edge.client.set_train_callback(callbacks.train)
        edge.issue(model_id=model_id)
        net.wait_for(lambda event: isinstance(event, UpdateReceived), timeout=10)
    assert net.events.of(PollReceived) == []


def test_a_program_downloads_models_itself(net, model_id):
    with RunningClient(net) as edge:
        edge.client.set_train_callback(callbacks.train)
        with edge.runtime.get_model_from_combiner(model_id) as model:
            assert model.model_id == model_id


@pytest.mark.parametrize("start_method", ["template", "spawn"])
def test_a_closure_over_the_client_works_with_either_start_method(net, start_method):
    with RunningClient(net, start_method=start_method) as edge:
        client, offset = edge.client, 40

        def answer(parameters):
            client.log_metric({"offset": offset})
            return {"sum": offset + parameters["x"], "id": client.client_id}

        client.set_custom_callback("answer", answer)
        end = one_end(net, edge.issue("Custom_answer", parameters={"x": 2}))
    assert end.response == {"sum": 42, "id": "id-edge"}
    assert [event.metrics for event in net.events.of(MetricReceived)] == [{"offset": 40.0}]
