"""A client that is killed with -9, and the one that starts after it."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import signal
import socket
import sqlite3
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from observing import wait_until
from programs_at_work import Program

from scaleout_mp import ScaleoutModel
from scaleout_mp.localnet import Fault, LocalNetworkThread
from scaleout_mp.localnet.events import (
    ClientConnected,
    MetricReceived,
    PollReceived,
    StatusReceived,
    TaskReported,
    UpdateReceived,
    ValidationReceived,
)
from scaleout_mp.wire import edge_pb2 as pb

SCRIPT = Path(__file__).with_name("crash_script.py")
UNAVAILABLE = Fault(code=grpc.StatusCode.UNAVAILABLE)
LOST_ANSWER = Fault(code=grpc.StatusCode.UNAVAILABLE, after=True)
ENVIRONMENT = {"SCALEOUT_CLIENT_TASK_POLLING_INTERVAL": "0.1", "SCALEOUT_CLIENT_SEND_TELEMETRY": "false"}
ALWAYS = 100_000


@pytest.fixture
def net(tmp_path):
    with LocalNetworkThread(tmp_path / "net", lost_after=60) as network:
        yield network


@pytest.fixture
def model_id(net):
    with ScaleoutModel.from_training_model([np.zeros(1_000, np.float32)]) as model:
        return net.add_model(model)


@contextlib.contextmanager
def client(net, **environment):
    """Run the script until it is connected. It is killed, with all its processes, at the end of the block."""
    before = len(net.events.of(ClientConnected))
    with Program(SCRIPT, net.api_url, env={**ENVIRONMENT, **environment}) as program:
        wait_until(lambda: len(net.events.of(ClientConnected)) > before, seconds=30, what="the client")
        yield program
    program.require_nothing_left(seconds=3)


def kill(program):
    program.kill()
    program.end(seconds=5)


def folder():
    (path,) = Path(os.environ["XDG_STATE_HOME"]).glob("scaleout_mp/clients/script-*")
    return path


def ask(query):
    """Look into the journal, as sqlite3's own program does."""
    with contextlib.closing(sqlite3.connect(folder() / "journal.db", timeout=5)) as file:
        return file.execute(query).fetchall()


def stage():
    return [stage for (stage,) in ask("SELECT state FROM tasks ORDER BY number")]


def ends(net, task):
    reports = net.events.of(TaskReported, lambda event: event.correlation_id == task.correlation_id and event.done)
    return [(event.status, event.response) for event in reports]


def metrics(net):
    """Return the steps in their order, and each once: a metric that came twice is the same to the last bit."""
    seen = {}
    for event in net.events.of(MetricReceived):
        same = seen.setdefault(event.timestamp, event)
        assert (same.step, same.metrics) == (event.step, event.metrics)
    return [seen[moment].step for moment in sorted(seen)]


def train(net, model_id, **settings):
    return net.issue("script", "Scaleout_ModelUpdate", model_id=model_id, data={"client_settings": settings})


def test_what_an_outage_kept_back_arrives_after_a_kill_and_then_the_end_of_the_task(net, model_id):
    with client(net) as program:
        task = train(net, model_id, steps=500, hang=True)
        net.faults.add("SendModelMetric", UNAVAILABLE, times=ALWAYS)
        wait_until(lambda: ask("SELECT count(*) FROM records") == [(500,)], seconds=20, what="500 records on the disk")
        kill(program)
    net.faults.clear()
    with client(net) as program:
        end = task.done(20)
        assert ask("SELECT count(*) FROM records") == [(0,)]
    assert end.status == "FAILED"
    assert (end.response["error"], end.response["reason"]) == ("supervisor restarted", "supervisor_restarted")
    assert metrics(net) == list(range(500))
    reports = net.events.of(TaskReported, lambda event: event.done)
    assert {event.correlation_id for event in reports} == {task.correlation_id}
    assert max(event.monotonic for event in net.events.of(MetricReceived)) < reports[0].monotonic
    assert [event.client_id for event in net.events.of(ClientConnected)] == ["script", "script"]
    assert any("supervisor restarted" in event.status for event in net.events.of(StatusReceived))


@pytest.mark.parametrize("number", range(3))
def test_a_kill_at_any_moment_leaves_a_whole_beginning(net, model_id, number):
    with client(net) as program:
        task = train(net, model_id, pause=0.002)
        seen = 50 + 71 * number
        wait_until(lambda: len(net.events.of(MetricReceived)) > seen, seconds=20, what="metrics")
        if number:
            net.faults.add("SendModelMetric", LOST_ANSWER if number == 1 else UNAVAILABLE, times=5)
        time.sleep(0.05 * number)
        kill(program)
    with client(net):
        assert task.done(20).response["error"] == "supervisor restarted"
    steps = metrics(net)
    assert steps == list(range(len(steps)))
    assert len(steps) > seen


def test_a_result_that_was_not_uploaded_is_delivered_by_the_next_start(net, model_id):
    net.faults.add("Upload", UNAVAILABLE, times=ALWAYS)
    with client(net) as program:
        task = train(net, model_id, steps=3)
        wait_until(lambda: stage() == ["result"], seconds=20, what="the result on the disk")
        kill(program)
    assert len(list((folder() / "results").iterdir())) == 1
    net.faults.clear()
    with client(net):
        assert task.done(20).status == "COMPLETED"
        assert list((folder() / "results").iterdir()) == []
    (update,) = net.events.of(UpdateReceived)
    assert update.correlation_id == task.correlation_id
    assert update.meta["training_metadata"] == {"num_examples": 7}
    assert {"upload_model", "fetch_model", "processing_time", "config"} <= update.meta.keys()
    with net.open_model(update.model_update_id) as model:
        assert (model.get_training_model()[0] == 1).all()
    assert [status for status, _ in ends(net, task)] == ["COMPLETED"]


@pytest.mark.parametrize("fault", [LOST_ANSWER, UNAVAILABLE])
def test_an_update_under_way_at_a_kill_is_sent_again_as_it_was(net, model_id, fault):
    net.faults.add("SendModelUpdate", fault, times=ALWAYS)
    with client(net) as program:
        task = train(net, model_id, steps=3)
        wait_until(lambda: stage() == ["sent"], seconds=20, what="the update in the journal")
        if fault.after:
            net.wait_for(lambda event: isinstance(event, UpdateReceived), timeout=10)
        kill(program)
    net.faults.clear()
    with client(net):
        assert task.done(20).status == "COMPLETED"
    updates = net.events.of(UpdateReceived)
    assert len({(event.model_update_id, str(event.meta)) for event in updates}) == 1
    assert [status for status, _ in ends(net, task)] == ["COMPLETED"]


def test_a_validation_under_way_at_a_kill_is_sent_again(net, model_id):
    net.faults.add("SendModelValidation", UNAVAILABLE, times=ALWAYS)
    with client(net) as program:
        task = net.issue("script", "Scaleout_Validation", model_id=model_id)
        wait_until(lambda: stage() == ["sent"], seconds=20, what="the validation in the journal")
        kill(program)
    net.faults.clear()
    with client(net):
        assert task.done(20).status == "COMPLETED"
    assert len(net.events.of(ValidationReceived)) == 1


def test_an_end_that_was_not_told_is_told_by_the_next_start_and_the_task_runs_once(net, tmp_path):
    path = tmp_path / "runs"
    with client(net) as program:
        task = net.issue("script", "Custom_count", data={"parameters": {"path": str(path)}})
        wait_until(path.exists, seconds=20, what="the run")
        net.faults.add("PollAndReportAsync", UNAVAILABLE, times=ALWAYS)
        wait_until(lambda: stage() in (["ended"], ["told"]), seconds=10, what="the end")
        kill(program)
    net.faults.clear()
    with client(net):
        assert task.done(20).response == {"ok": True}
        # Once more, as a server does that has not taken the report in.
        polls = len(net.events.of(PollReceived))
        again = pb.TaskRequest(correlation_id=task.correlation_id, type="Custom_count", data='{"parameters": {}}')
        net.push_directive("script", again)
        wait_until(lambda: len(net.events.of(PollReceived)) > polls + 4, what="polls")
    assert {(status, str(response)) for status, response in ends(net, task)} == {("COMPLETED", "{'ok': True}")}
    assert path.read_text() == "run\n"


def test_a_result_is_delivered_whose_task_a_damaged_journal_has_lost(net, model_id):
    with client(net) as program:
        done = train(net, model_id, steps=5)
        wait_until(lambda: stage() == ["received"], seconds=20, what="the first task")
        cut_off = train(net, model_id, steps=5, hang=True)
        net.faults.add("SendModelMetric", UNAVAILABLE, times=ALWAYS)
        net.faults.add("Upload", Fault(hang=0))
        wait_until(lambda: sorted(stage()) == ["received", "result"], seconds=20, what="a result on the disk")
        kill(program)
    ((page,),) = ask("SELECT rootpage FROM sqlite_master WHERE name = 'tasks'")
    journal = folder() / "journal.db"
    data = journal.read_bytes()
    journal.write_bytes(data[: (page - 1) * 4096] + bytes(4096) + data[page * 4096 :])
    net.faults.clear()
    with client(net) as program:
        assert cut_off.done(20).status == "FAILED"
        assert done.done(20).status == "COMPLETED"
        kill(program)
    (line,) = [line for line in program.lines if line.startswith("ERROR")]
    assert "what is known of 0 tasks" in line
    assert len(net.events.of(UpdateReceived)) == 1
    assert [len(ends(net, task)) for task in (cut_off, done)] == [1, 1]
    assert len(metrics(net)) == 10
    assert not [*(folder() / "results").iterdir(), *(folder() / "notes").iterdir()]


def test_records_that_a_goodbye_could_not_send_are_sent_by_the_next_start(net, model_id):
    with client(net) as program:
        task = train(net, model_id, steps=300, hang=True)
        net.faults.add("SendModelMetric", UNAVAILABLE, times=ALWAYS)
        wait_until(lambda: ask("SELECT count(*) FROM records") == [(300,)], seconds=20, what="300 records on the disk")
        program.send(signal.SIGTERM)
        assert program.end(seconds=15) == 0
        assert "the next start sends them" in program.output
    # The end is told all the same, and the goodbye is said.
    assert [status for status, _ in ends(net, task)] == ["INTERRUPTED"]
    net.faults.clear()
    with client(net):
        wait_until(lambda: metrics(net) == list(range(300)), seconds=20, what="all metrics")
    assert len(ends(net, task)) == 1


def test_a_second_client_with_the_same_id_is_told_who_has_it(net):
    with client(net) as program, Program(SCRIPT, net.api_url, env=ENVIRONMENT) as second:
        assert second.end(seconds=30) == 1
        assert f"(process {program.pid})" in second.lines[-1]
        assert second.lines[-1].startswith("scaleout_mp.errors.StateInUseError: another client with this id runs")
    with client(net):
        pass


def test_a_client_that_is_killed_again_and_again_tells_each_end_once(net, model_id):
    tasks = []
    for number in range(4):
        with client(net) as program:
            tasks.append(train(net, model_id, steps=20, pause=0.01, hang=number % 2 == 0))
            enough = len(net.events.of(MetricReceived)) + 5
            wait_until(lambda: len(net.events.of(MetricReceived)) > enough, seconds=20, what="metrics")  # noqa: B023
            kill(program)
    with client(net):
        for task in tasks:
            task.done(20)
    for task in tasks:
        assert len({(status, str(response)) for status, response in ends(net, task)}) == 1
    # Of each task, a whole beginning.
    steps = metrics(net)
    counts = collections.Counter(step for step in steps)
    assert all(counts[step] >= counts[step + 1] for step in itertools.takewhile(lambda s: s < 19, itertools.count()))


def test_a_service_manager_hears_that_the_client_is_up_lives_and_ends(net, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(10)
        heard = []

        def until(text):
            while not any(text in message for message in heard):
                heard.append(manager.recv(4096).decode())

        told = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
        with client(net, **told) as program:
            for text in ("READY=1", "STATUS=connected", "WATCHDOG=1"):
                until(text)
            net.faults.always("Announce", Fault(delay=1))
            program.send(signal.SIGTERM)
            until("STOPPING=1")
            heard.clear()
            # A watchdog does not wait for a goodbye.
            until("WATCHDOG=1")
            assert program.end(seconds=15) == 0


def test_a_client_without_an_id_has_the_same_after_a_kill_and_another_than_its_twin(net):
    def ids():
        return [event.client_id for event in net.events.of(ClientConnected)]

    with client(net, ID="") as first, client(net, ID="") as twin:
        kill(first)
        kill(twin)
    with client(net, ID=""), client(net, ID=""):
        pass
    before, after = ids()[:2], ids()[2:]
    assert before == after
    assert len(set(before)) == 2
