"""Sessions of a local network with scripted clients over real gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import json

import grpc
import numpy as np
import pytest
from scripted_client import ScriptedClient, trains_to, validates_as, weights

from scaleout_mp.errors import ConfigError, LocalNetworkError
from scaleout_mp.localnet import LocalNetwork, LocalNetworkThread, RunStatus, SessionPlan, serve
from scaleout_mp.localnet.events import (
    ClientDisconnected,
    RoundStarted,
    SessionFinished,
    TaskDelivered,
    TaskReported,
    UpdateReceived,
    UpdateRejected,
)
from scaleout_mp.model import ScaleoutModel
from scaleout_mp.wire import edge_pb2 as pb


@pytest.fixture
def net(tmp_path):
    with LocalNetworkThread(tmp_path / "net", lost_after=1.0) as network:
        yield network


@pytest.fixture
def seed():
    with ScaleoutModel.from_training_model(weights(0.0), metadata={"dataset": "toy"}) as model:
        yield model


def client(net, name, **scripts):
    scripts.setdefault("validate", validates_as(accuracy=0.5))
    return ScriptedClient(net.combiner_address, name, **scripts)


def test_two_rounds_weighted_by_examples(net, seed, tmp_path):
    one = client(net, "one", train=trains_to(1.0, 1), validate=validates_as(accuracy=0.25, label="x"))
    three = client(net, "three", train=trains_to(3.0, 3), validate=validates_as(accuracy=0.75))
    with one, three:
        net.wait_for_clients(2, timeout=5)
        plan = SessionPlan(rounds=2, min_clients=2, min_updates=2, client_settings={"lr": 0.1})
        result = net.run_session(plan, seed, timeout=20)

    assert result.status is RunStatus.FINISHED
    assert [round_.number for round_ in result.rounds] == [1, 2]
    for round_ in result.rounds:
        assert {update.client_id: update.num_examples for update in round_.used_updates} == {
            "id-one": 1,
            "id-three": 3,
        }
        assert round_.metrics == {"accuracy": 0.5}
        assert all(task.completed for task in round_.tasks)
        assert len(round_.tasks) == 4
    # (1 * 1 + 3 * 3) / 4 = 2.5 per round.
    with net.open_model(result.model_id) as model:
        for array in model.get_training_model():
            assert array.dtype == np.float32
            np.testing.assert_allclose(array, 5.0)
        assert model.metadata["dataset"] == "toy"
        assert model.model_id == result.model_id
    assert result.rounds[0].new_model_id == result.rounds[1].model_id != result.seed_model_id
    assert json.loads(one.tasks[0].data) == {"client_settings": {"lr": 0.1}}

    first = json.loads((tmp_path / "net/rounds/0001.json").read_text())
    assert first["metrics"] == {"accuracy": 0.5}
    summary = json.loads((tmp_path / f"net/sessions/{plan.session_id}.json").read_text())
    assert summary["status"] == "FINISHED"
    assert len(summary["rounds"]) == 2
    # The updates are gone; seed and two global models are left.
    assert len(list((tmp_path / "net/models").iterdir())) == 3
    reports = net.events.of(TaskReported, lambda event: event.done)
    assert len({report.correlation_id for report in reports}) == len(reports) == 8


def test_updates_are_kept_on_request(net, seed, tmp_path):
    with client(net, "a", train=trains_to(1.0)):
        result = net.run_session(SessionPlan(rounds=1, keep_updates=True, validate=False), seed, timeout=20)
    kept = tmp_path / "net/models" / f"{result.rounds[0].updates[0].model_update_id}.scm"
    assert kept.is_file()


def test_a_failing_client_ends_the_wait_for_it_at_once(net, seed):
    def fails(client, task):
        return "FAILED", {"error": "out of paper"}

    with client(net, "good", train=trains_to(1.0)), client(net, "bad", train=fails):
        plan = SessionPlan(rounds=1, min_clients=2, round_timeout=60)
        result = net.run_session(plan, seed, timeout=10)
    assert result.finished
    (failed,) = [task for task in result.rounds[0].tasks if task.status == "FAILED"]
    assert failed.client_id == "id-bad"
    assert failed.response == {"error": "out of paper"}
    assert any("out of paper" in line for line in net.lines())


def test_a_round_without_enough_updates_is_tried_again_then_the_session_fails(net, seed, tmp_path):
    with client(net, "bad", train=lambda client, task: ("FAILED", {"error": "no"})):
        result = net.run_session(SessionPlan(rounds=3, round_retries=1), seed, timeout=10)
    assert result.status is RunStatus.FAILED
    assert "0 of 1 updates" in result.reason
    assert [(round_.number, round_.attempt) for round_ in result.rounds] == [(1, 1), (1, 2)]
    assert sorted(path.name for path in (tmp_path / "net/rounds").iterdir()) == ["0001.json", "0002.json"]


def test_a_straggler_gets_timeout_and_the_round_goes_on(net, seed):
    with client(net, "fast", train=trains_to(1.0)), client(net, "slow", train=lambda client, task: None) as slow:
        plan = SessionPlan(rounds=1, min_clients=2, round_timeout=0.5, validate=False)
        result = net.run_session(plan, seed, timeout=10)
        assert result.finished
        statuses = {task.client_id: task.status for task in result.rounds[0].tasks}
        assert statuses == {"id-fast": "COMPLETED", "id-slow": "TIMEOUT"}
        # The straggler is told at every poll until it reports the end; after that never again.
        task = slow.tasks[0]
        net.wait_for(lambda event: len(slow.stops) >= 2, timeout=5)
        assert {stop.status for stop in slow.stops} == {"TIMEOUT"}
        slow.finish(task.correlation_id, "INTERRUPTED", {"msg": "Timed out by server"})
        net.wait_for(
            lambda event: isinstance(event, TaskReported) and event.done and event.client_id == "id-slow", timeout=5
        )


def test_an_update_that_arrived_counts_although_its_client_was_never_done(net, seed):
    def updates_but_hangs(client, task):
        trains_to(2.0)(client, task)

    with client(net, "hangs", train=updates_but_hangs):
        plan = SessionPlan(rounds=1, round_timeout=0.5, validate=False)
        result = net.run_session(plan, seed, timeout=10)
    assert result.finished
    assert len(result.rounds[0].used_updates) == 1


def test_an_update_may_come_after_the_done_report(net, seed):
    late = []

    def completes_first(client, task):
        late.append(task)
        return "COMPLETED", {}

    with client(net, "late", train=completes_first) as scripted:
        future = net.start_session(SessionPlan(rounds=1, validate=False, late_grace=10), seed)
        net.wait_for(lambda event: isinstance(event, TaskReported) and event.done, timeout=5)
        trains_to(1.0)(scripted, late[0])
        assert future.result(10).finished


def test_completed_without_an_update_is_left_out(net, seed):
    with client(net, "empty", train=lambda client, task: ("COMPLETED", {})):
        plan = SessionPlan(rounds=1, late_grace=0.05, round_retries=0)
        assert net.run_session(plan, seed, timeout=10).status is RunStatus.FAILED
    assert "sent no update" in net.events.of(UpdateRejected)[0].reason


@pytest.mark.parametrize(
    ("arrays", "meta", "reason"),
    [
        ([np.zeros(3, np.float32)], None, "shapes"),
        ([np.full(4, np.nan, np.float32), np.zeros((2, 2), np.float32)], None, "finite"),
        (weights(1.0), {"training_metadata": {"num_examples": 0}}, "num_examples"),
        (weights(1.0), {"training_metadata": {"num_examples": True}}, "num_examples"),
        (weights(1.0), {"loss": 1}, "num_examples"),
    ],
)
def test_an_update_that_does_not_fit_is_left_out(net, seed, arrays, meta, reason):
    def bad(client, task):
        model = ScaleoutModel.from_training_model(arrays)
        client.upload(model)
        client.send_update(task, model, meta=meta)
        return "COMPLETED", {}

    with client(net, "bad", train=bad), client(net, "good", train=trains_to(1.0)):
        plan = SessionPlan(rounds=1, min_clients=2, validate=False)
        result = net.run_session(plan, seed, timeout=10)
    (rejected,) = [update for update in result.rounds[0].updates if update.rejected]
    assert reason in rejected.rejected
    with net.open_model(result.model_id) as model:
        np.testing.assert_allclose(model.get_training_model()[0], 1.0)


def test_a_client_that_vanishes_is_lost_and_its_task_has_failed(net, seed):
    def vanishes(client, task):
        client.vanish()

    with client(net, "gone", train=vanishes), client(net, "good", train=trains_to(1.0)):
        plan = SessionPlan(rounds=1, min_clients=2, round_timeout=60, validate=False)
        result = net.run_session(plan, seed, timeout=15)
    assert result.finished
    (failed,) = [task for task in result.rounds[0].tasks if task.client_id == "id-gone"]
    assert (failed.status, failed.reason) == ("FAILED", "the client was lost")
    assert any(event.lost for event in net.events.of(ClientDisconnected))


def test_a_lost_client_that_comes_back_is_told_to_stop(net, seed):
    silent = client(net, "back")
    silent.announce("Connect")
    issued = net.issue(silent.client_id, "Custom_long")
    (task,) = silent.poll()
    assert issued.done(5).reason == "the client was lost"
    running = pb.ActivityReport(correlation_id=task.correlation_id, status="RUNNING")
    assert [answer.status for answer in silent.poll(running)] == ["INTERRUPTED"]
    silent.close()


def test_an_outage_of_the_network_loses_no_client(net, seed):
    patient = client(net, "patient")
    patient.announce("Connect")
    net.stop_combiner()
    # Longer than `lost_after`, which is 1 s here.
    with pytest.raises(LocalNetworkError):
        net.wait_for(lambda event: isinstance(event, ClientDisconnected), timeout=1.3)
    net.restart_combiner()
    assert net.clients()[0].connected
    patient.close()


def test_models_of_a_failed_task_are_removed(net, seed, tmp_path):
    def updates_then_fails(client, task):
        trains_to(1.0)(client, task)
        return "FAILED", {"error": "after all"}

    with client(net, "a", train=updates_then_fails):
        result = net.run_session(SessionPlan(rounds=1, round_retries=0), seed, timeout=10)
    assert result.status is RunStatus.FAILED
    assert [path.stem for path in (tmp_path / "net/models").iterdir()] == [seed.model_id]


def test_an_aborted_round_ends_at_once_and_the_session_goes_on(net, seed):
    attempts = []

    def first_hangs(client, task):
        attempts.append(task)
        return None if len(attempts) == 1 else trains_to(1.0)(client, task)

    with client(net, "a", train=first_hangs) as scripted:
        future = net.start_session(SessionPlan(rounds=2, round_timeout=60, validate=False), seed)
        net.wait_for(lambda event: isinstance(event, TaskDelivered), timeout=5)
        assert net.abort_round()
        result = future.result(10)
        assert [round_.status for round_ in result.rounds] == [RunStatus.ABORTED, RunStatus.FINISHED]
        net.wait_for(lambda event: bool(scripted.stops), timeout=5)
        assert scripted.stops[0].status == "INTERRUPTED"
        assert scripted.stops[0].correlation_id == attempts[0].correlation_id
    assert not net.abort_round()


def test_an_aborted_session_interrupts_its_tasks(net, seed):
    with client(net, "a", train=lambda client, task: None) as scripted:
        future = net.start_session(SessionPlan(rounds=2, round_timeout=60), seed)
        net.wait_for(lambda event: isinstance(event, TaskDelivered), timeout=5)
        with pytest.raises(LocalNetworkError, match="running already"):
            net.run_session(SessionPlan(rounds=1), seed)
        assert net.abort_session()
        with pytest.raises(BaseException):  # noqa: B017, PT011 - the future's own CancelledError
            future.result(5)
        net.wait_for(lambda event: bool(scripted.stops), timeout=5)
    (finished,) = net.events.of(SessionFinished)
    assert finished.status == "ABORTED"


def test_late_updates_of_a_closed_round_are_removed(net, seed, tmp_path):
    with client(net, "slow", train=lambda client, task: None) as slow:
        plan = SessionPlan(rounds=1, round_timeout=0.3, round_retries=0)
        assert net.run_session(plan, seed, timeout=10).status is RunStatus.FAILED
        trains_to(1.0)(slow, slow.tasks[0])
        net.wait_for(lambda event: isinstance(event, UpdateReceived), timeout=5)
    assert [path.stem for path in (tmp_path / "net/models").iterdir()] == [seed.model_id]


def test_too_few_clients(net, seed):
    with pytest.raises(LocalNetworkError, match="0 of 2 clients"):
        net.wait_for_clients(2, timeout=0.05)
    result = net.run_session(SessionPlan(rounds=1, min_clients=1, client_timeout=0.05), seed, timeout=5)
    assert result.status is RunStatus.FAILED
    assert not net.events.of(RoundStarted)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounds": 0},
        {"rounds": True},
        {"rounds": 1, "min_updates": 0},
        {"rounds": 1, "round_timeout": -1},
        {"rounds": 1, "round_timeout": None},
        {"rounds": 1, "session_id": "../up"},
    ],
)
def test_a_wrong_plan_names_the_field(wrong):
    with pytest.raises(ConfigError, match=list(wrong)[-1]):
        SessionPlan(**wrong)


def test_serve_runs_a_session_and_says_lines(tmp_path, seed):
    lines = []

    async def main():
        plan = SessionPlan(rounds=1)
        serves = asyncio.Event()

        def on_line(line):
            lines.append(line)
            serves.set()

        serving = asyncio.create_task(serve(tmp_path, on_line=on_line, session=plan, seed=seed))
        await serves.wait()
        address = lines[0].split("combiner at ")[1].split(",")[0]
        scripted = ScriptedClient(address, "a", train=trains_to(1.0), validate=validates_as(accuracy=1.0))
        await asyncio.to_thread(scripted.__enter__)
        try:
            result = await serving
        finally:
            # The network may be gone before the client's last poll.
            with contextlib.suppress(grpc.RpcError):
                await asyncio.to_thread(scripted.__exit__)
        return result

    assert asyncio.run(main()).finished
    assert any("round 1 finished: 1 updates" in line for line in lines)


def test_the_network_without_a_thread(tmp_path, seed):
    async def main():
        async with LocalNetwork(tmp_path) as network:
            model_id = await network.add_model(seed)
            issued = await network.issue("nobody", "Custom_x")
            assert network.abort_task(issued.correlation_id)
            assert (await issued.done(1)).status == "INTERRUPTED"
            assert not network.abort_task(issued.correlation_id)
            with network.open_model(model_id) as model:
                assert model.model_id == seed.model_id
            with pytest.raises(LocalNetworkError, match="no model"):
                network.open_model("other")

    asyncio.run(main())
