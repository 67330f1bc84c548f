"""The edge client with `isolation="worker"`: callbacks that keep their state between tasks."""

from __future__ import annotations

import edge_callbacks as callbacks
import numpy as np
import pytest
from edge_running import RunningClient

from scaleout_mp import ConfigError, GrpcEdgeClientRuntime, ScaleoutModel
from scaleout_mp.localnet import LocalNetworkThread, RunStatus, SessionPlan
from scaleout_mp.localnet.events import MetricReceived, TaskReported, UpdateReceived, ValidationReceived


@pytest.fixture
def net(tmp_path):
    with LocalNetworkThread(tmp_path / "net") as network:
        yield network


@pytest.fixture
def model_id(net):
    with ScaleoutModel.from_training_model([np.zeros((3, 3), np.float32)]) as model:
        return net.add_model(model)


def run_to_end(net, edge, task_type, **data):
    task = edge.issue(task_type, **data)
    task.done(20)
    (end,) = net.events.of(TaskReported, lambda event: event.correlation_id == task.correlation_id and event.done)
    return end.status, end.response


def set_keeper(edge):
    keeper = callbacks.Keeper(edge.client)
    edge.client.set_train_callback(keeper.train)
    edge.client.set_validate_callback(keeper.validate)
    edge.client.set_custom_callback("look", keeper.custom)


def test_callbacks_of_one_object_share_it_through_a_session(net):
    with RunningClient(net, isolation="worker") as edge:
        set_keeper(edge)
        with ScaleoutModel.from_training_model([np.zeros((3, 3), np.float32)]) as seed:
            result = net.run_session(SessionPlan(rounds=3), seed, timeout=30)
        status, seen = run_to_end(net, edge, "Custom_look")

    assert result.status is RunStatus.FINISHED
    updates = net.events.of(UpdateReceived)
    assert [update.meta["trained"] for update in updates] == [1, 2, 3]
    pids = {update.meta["pid"] for update in updates} | {round_.metrics["pid"] for round_ in result.rounds}
    assert [round_.metrics["trained"] for round_ in result.rounds] == [1, 2, 3]
    assert (status, seen) == ("COMPLETED", {"trained": 3, "pid": pids.pop(), "heavy": []})
    assert not pids
    # Each metric is of its own round.
    logged = [(event.metrics["trained"], event.round_id) for event in net.events.of(MetricReceived)]
    assert logged == [(number, update.round_id) for number, update in enumerate(updates, 1)]


def test_a_crash_costs_its_task_and_what_the_callbacks_kept(net, model_id):
    with RunningClient(net, isolation="worker") as edge:
        set_keeper(edge)
        ends = [
            run_to_end(net, edge, "Scaleout_ModelUpdate", model_id=model_id, settings=settings)
            for settings in ({}, {"crash": True}, {})
        ]
        run_to_end(net, edge, "Scaleout_Validation", model_id=model_id)
    assert [status for status, _ in ends] == ["COMPLETED", "FAILED", "COMPLETED"]
    assert ends[1][1]["reason"] == "crashed"
    assert [update.meta["trained"] for update in net.events.of(UpdateReceived)] == [1, 1]
    (validation,) = net.events.of(ValidationReceived)
    assert validation.metrics["trained"] == 1


def test_a_callback_that_is_replaced_starts_anew(net):
    with RunningClient(net, isolation="worker") as edge:
        set_keeper(edge)
        first = run_to_end(net, edge, "Custom_look")[1]
        assert run_to_end(net, edge, "Custom_look")[1] == first
        edge.client.set_custom_callback("answer", callbacks.answer)
        assert run_to_end(net, edge, "Custom_answer") == ("COMPLETED", {"ok": True})
        assert run_to_end(net, edge, "Custom_look")[1]["pid"] != first["pid"]


def test_a_mode_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match="isolation"):
        GrpcEdgeClientRuntime(isolation="thread")


@pytest.mark.parametrize("isolation", ["task", "worker"])
def test_client_state_is_each_callbacks_own_and_survives(net, model_id, isolation):
    with RunningClient(net, isolation=isolation) as edge:
        stateful = callbacks.Stateful(edge.client)
        edge.client.set_train_callback(stateful.train)
        edge.client.set_custom_callback("look", stateful.look)
        ends = [
            run_to_end(net, edge, "Scaleout_ModelUpdate", model_id=model_id, settings=settings)[0]
            for settings in ({}, {}, {"crash": True}, {})
        ]
        looked = [run_to_end(net, edge, "Custom_look")[1] for _ in range(2)]
    assert ends == ["COMPLETED", "COMPLETED", "FAILED", "COMPLETED"]
    updates = [update.meta for update in net.events.of(UpdateReceived)]
    # A crash costs what that task did to it; in a worker, all of it.
    assert [meta["momentum"][0] for meta in updates] == ([1, 2, 3] if isolation == "task" else [1, 2, 1])
    assert len({meta["pid"] for meta in updates}) == (3 if isolation == "task" else 2)
    assert looked == [{"looked": 1}, {"looked": 2}]
