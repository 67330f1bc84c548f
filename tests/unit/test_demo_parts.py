"""The pure parts of the demo: division of the data, plan, ledger, verdict, summary, views."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json

import numpy as np
import pytest

from scaleout_mp.demo import digits, feed, perceptron, views
from scaleout_mp.demo.faults import FaultKind, PlannedFault, plan_faults
from scaleout_mp.demo.fleet import ClientExit
from scaleout_mp.demo.ledger import TRAINING, Ledger, TaskEnd
from scaleout_mp.demo.summary import DemoResult, print_summary
from scaleout_mp.demo.verdict import Observations, RoundScore, judge
from scaleout_mp.errors import ConfigError
from scaleout_mp.localnet import RoundResult, RunStatus, SessionResult, UpdateResult
from scaleout_mp.localnet import events as ev
from scaleout_mp.supervisor.snapshot import ClientSnapshot, TaskSnapshot

CLIENTS = ("client-1", "client-2", "client-3", "client-4")


# The data


def test_no_image_is_in_two_places():
    division = digits.divide(digits.load(), 4)
    parts = [division.held_out, *(part for shard in division.shards for part in (shard.training, shard.validation))]
    assert sum(len(part) for part in parts) == 1797
    # Each image gets a number of its own: pixels may repeat, positions may not.
    numbered = dataclasses.replace(digits.load(), images=np.arange(1797.0).reshape(-1, 1))
    division = digits.divide(numbered, 4)
    parts = [division.held_out, *(part for shard in division.shards for part in (shard.training, shard.validation))]
    positions = np.concatenate([part.images[:, 0] for part in parts])
    assert len(np.unique(positions)) == 1797
    assert len(division.held_out) == pytest.approx(0.2 * 1797, rel=0.02)


def test_each_client_has_a_run_of_neighbours():
    numbered = dataclasses.replace(digits.load(), images=np.arange(1797.0).reshape(-1, 1))
    ends = []
    for shard in digits.divide(numbered, 4).shards:
        own = np.concatenate([shard.training.images, shard.validation.images])
        ends.append((own.min(), own.max()))
    assert all(last < first for (_, last), (first, _) in itertools.pairwise(ends))


def test_shard_survives_the_disk(tmp_path):
    shard = digits.divide(digits.load(), 4).shards[2]
    shard.save(tmp_path / "data.npz")
    found = digits.Shard.load(tmp_path / "data.npz")
    np.testing.assert_array_equal(found.training.images, shard.training.images)
    np.testing.assert_array_equal(found.validation.labels, shard.validation.labels)


def test_training_learns_and_counts_its_rounds():
    shard = digits.divide(digits.load(), 4).shards[0].training
    weights = perceptron.initial(64)
    before = [array.copy() for array in weights]
    training = perceptron.Training(weights, shard.images, shard.labels, perceptron.Schedule(epochs=10))
    losses = [loss for _, loss in training.epochs()]
    assert losses[-1] < losses[0]
    assert perceptron.rounds_trained(training.weights) == 1
    assert [array.dtype for array in training.weights] == [np.float32] * 5
    for array, old in zip(weights, before, strict=True):
        np.testing.assert_array_equal(array, old)


def test_gradient_is_that_of_the_loss():
    rng = np.random.default_rng(3)
    images, labels = rng.random((8, 64)), rng.integers(0, 10, 8)
    weights = [array.astype(np.float64) for array in perceptron.initial(64, hidden=6)]
    rate = 1e-3
    schedule = perceptron.Schedule(epochs=1, batch_size=8, learning_rate=rate)
    training = perceptron.Training(weights, images, labels, schedule)
    list(training.epochs())
    for place in [(0, (5, 2)), (1, (3,)), (2, (4, 7)), (3, (1,))]:
        array, index = place
        shifted = [part.copy() for part in weights]
        slopes = []
        for change in (1e-6, -1e-6):
            shifted[array][index] = weights[array][index] + change
            slopes.append(perceptron.measure(shifted, images, labels)["loss"])
        slope = (slopes[0] - slopes[1]) / 2e-6
        step = weights[array][index] - training.weights[array][index]
        assert step / rate == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_schedule_reads_what_the_server_sent():
    assert perceptron.Schedule.from_settings({"epochs": 3, "unknown": 1}).epochs == 3


# The plan


@pytest.mark.parametrize("rounds", range(3, 13))
def test_every_fault_leaves_healthy_clients_and_a_round_to_come_back(rounds):
    planned = plan_faults(CLIENTS, rounds)
    assert {fault.client for fault in planned} == set(CLIENTS)
    assert {fault.kind for fault in planned} == set(FaultKind)
    assert all(1 <= fault.round < rounds for fault in planned)
    numbers = [fault.round for fault in planned]
    assert max(numbers.count(number) for number in numbers) <= 2


def test_fault_reads_what_it_writes():
    fault = PlannedFault(client="client-1", round=2, kind=FaultKind.HANG)
    assert PlannedFault.parse(str(fault), client="client-1") == fault
    with pytest.raises(ConfigError, match="segfault:2"):
        PlannedFault.parse("explode:2", client="client-1")


def test_feed_carries_the_snapshot():
    task = TaskSnapshot(
        correlation_id="c", type=TRAINING, model_id="m", round_id="r", session_id="s", phase="running",
        process_state="stopping", memory_now=5, memory_peak=7, memory_limit=9, last_metrics={"loss": 0.5}, last_step=3,
    )  # fmt: skip
    snapshot = ClientSnapshot(name="n", client_id="n", connected=True, pending_messages=0, tasks=(task,))
    (view,) = feed.decode(feed.encode(snapshot))
    assert (view.state, view.memory, view.limit, view.step) == ("stopping", 5, 9, 3)
    assert view.metrics == {"loss": 0.5}


# The ledger


def play(ledger, *events):
    return [line.text for line in map(ledger.take, events) if line is not None]


def started(number):
    return ev.RoundStarted(
        session_id="s", round_id=f"r{number}", number=number, attempt=1, model_id="m", clients=CLIENTS
    )


def issued(task, client, number):
    return ev.TaskIssued(
        client_id=client, correlation_id=task, task_type=TRAINING, model_id="m", session_id="s", round_id=f"r{number}"
    )


def reported(task, client, status, **response):
    return ev.TaskReported(
        client_id=client, correlation_id=task, task_type=TRAINING, status=status, done=True, response=response
    )


def status(client, text):
    return ev.StatusReceived(client_id=client, status=text, level="WARNING", status_type=TRAINING, timestamp=0.0)


def metric(client, step, number):
    return ev.MetricReceived(
        client_id=client, metrics={"loss": 1.0}, model_id="m", round_id=f"r{number}", session_id="s", step=step,
        timestamp=0.0,
    )  # fmt: skip


def test_ledger_explains_a_failure_by_its_report():
    ledger = Ledger(rounds=2)
    lines = play(
        ledger,
        started(1),
        issued("t", "client-1", 1),
        metric("client-1", 20, 1),
        reported("t", "client-1", "FAILED", error="crashed with\nSIGSEGV", reason="crashed", report={"signal": "X"}),
    )
    assert lines[-1] == "client-1, round 1: crashed with SIGSEGV"
    (end,) = ledger.failures
    assert (end.round, end.status, end.reason, end.last_step) == (1, "FAILED", "crashed", 20)
    assert end.report == {"signal": "X"}
    assert ledger.unreported == []


def test_ledger_explains_an_interruption_by_the_clients_last_status():
    ledger = Ledger(rounds=2)
    play(
        ledger,
        started(1),
        issued("t", "client-3", 1),
        status("client-3", "task train: Timed out by server; killed with SIGKILL (see docs/x.md#y)"),
        reported("t", "client-3", "INTERRUPTED", msg="Timed out by server"),
    )
    (end,) = ledger.failures
    assert end.reason == "timed_out_by_server"
    assert end.explanation == "Timed out by server; killed with SIGKILL"


def test_ledger_counts_a_repeated_report_once_and_keeps_contradictions():
    ledger = Ledger(rounds=2)
    end = reported("t", "client-1", "FAILED", error="e", reason="failed")
    assert len(play(ledger, started(1), issued("t", "client-1", 1), end, end)) == 2
    assert ledger.contradictions == []
    play(ledger, reported("t", "client-1", "COMPLETED"))
    assert len(ledger.failures) == len(ledger.contradictions) == 1


# The verdict


def failure(fault):
    wanted = fault.kind.expected
    return TaskEnd(
        correlation_id=f"{fault}", client=fault.client, round=fault.round, task_type=TRAINING, status=wanted.status,
        reason=wanted.reason, explanation=f"ended with {wanted.mentions}", report={"peak_memory": 2**20}, last_step=20,
    )  # fmt: skip


def good(rounds=8):
    planned = plan_faults(CLIENTS, rounds)
    results = []
    for number in range(1, rounds + 1):
        faulty = {fault.client for fault in planned if fault.round == number}
        updates = tuple(
            UpdateResult(client_id=name, correlation_id="c", model_update_id="u", num_examples=1.0, meta={})
            for name in CLIENTS
            if name not in faulty
        )
        results.append(
            RoundResult(
                session_id="s", round_id=f"r{number}", number=number, attempt=1, status=RunStatus.FINISHED,
                model_id="m", new_model_id="n", updates=updates, validations=(), tasks=(), seconds=1.0,
            )
        )  # fmt: skip
    session = SessionResult(
        session_id="s", status=RunStatus.FINISHED, reason="", seed_model_id="m", model_id="n", rounds=tuple(results),
        seconds=8.0,
    )  # fmt: skip
    return Observations(
        rounds=rounds,
        planned=planned,
        session=session,
        scores=tuple(RoundScore(number=n + 1, updates=4, accuracy=0.95, seconds=1.0) for n in range(rounds)),
        failures=tuple(failure(fault) for fault in planned),
        contradictions=(),
        client_exits=tuple(ClientExit(name=name, code=0, killed=False) for name in CLIENTS),
        leftovers=(),
    )


def problems(seen):
    return " | ".join(check.problem for check in judge(seen) if not check.passed)


def test_all_as_planned():
    assert problems(good()) == ""


def changed(**changes):
    return dataclasses.replace(good(), **changes)


def without_comeback():
    seen = good()
    rounds = tuple(
        dataclasses.replace(result, updates=tuple(u for u in result.updates if u.client_id != "client-3"))
        if result.number > 5
        else result
        for result in seen.session.rounds
    )
    return dataclasses.replace(seen, session=dataclasses.replace(seen.session, rounds=rounds))


def with_failures(*changes):
    failures = list(good().failures)
    for index, change in changes:
        failures[index] = dataclasses.replace(failures[index], **change)
    return changed(failures=tuple(failures))


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (changed(failures=good().failures[1:]), "segfault of client-1 in round 2: no failed tasks"),
        (changed(failures=(*good().failures, good().failures[0])), "segfault of client-1 in round 2: 2 failed tasks"),
        (with_failures((1, {"reason": "crashed"})), "leak of client-2 in round 3: FAILED (crashed), not FAILED"),
        (with_failures((2, {"explanation": "it went"})), "does not tell of SIGKILL"),
        (with_failures((3, {"round": 7})), "client-4, round 7"),
        (changed(contradictions=good().failures[:1]), "client-1 reported segfault:2 again as FAILED"),
        (without_comeback(), "client-3 did not after its hang"),
        (changed(scores=(*good().scores[:-1], RoundScore(number=8, updates=4, accuracy=0.89, seconds=1))), "0.890"),
        (changed(scores=good().scores[:-1]), "7 did"),
        (changed(leftovers=("process 7: python",)), "process 7: python"),
        (changed(client_exits=(ClientExit(name="client-1", code=-9, killed=True),)), "client-1 had to be killed"),
        (changed(client_exits=(ClientExit(name="client-1", code=1, killed=False),)), "client-1 ended with exit code 1"),
    ],
)
def test_what_did_not_come_out_is_said(seen, said):
    assert said in problems(seen)


def test_a_failed_session_is_said():
    session = dataclasses.replace(good().session, status=RunStatus.FAILED, reason="too few updates")
    assert "the session ended as FAILED: too few updates" in problems(changed(session=session))


# What people see


def result(seen):
    return DemoResult(seen=seen, checks=judge(seen), metrics=1234, seconds=33.0, folder="/somewhere")


def test_summary_explains_each_death_in_a_line():
    stream = io.StringIO()
    print_summary(result(good()), stream)
    lines = stream.getvalue().splitlines()
    assert [line for line in lines if line != line.rstrip()] == []
    for fault in good().planned:
        (line,) = [line for line in lines if fault.client in line]
        assert f"round {fault.round}" in line
        assert fault.kind.expected.mentions in line
    assert "All came out as planned (33 s, 1,234 metrics received; all files are in /somewhere)." in lines


def test_summary_says_what_failed():
    stream = io.StringIO()
    print_summary(result(changed(leftovers=("process 7: python",))), stream)
    assert "FAIL  no process is left: process 7: python" in stream.getvalue()
    assert "1 of 7 checks failed" in stream.getvalue()


def test_summary_does_without_unicode():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_summary(result(good()), stream)
    stream.flush()
    assert b"All came out as planned" in stream.buffer.getvalue()


def test_summary_is_json():
    found = json.loads(json.dumps(result(good()).to_dict()))
    assert found["passed"] is True
    assert [failure["planned"] for failure in found["failures"]] == ["segfault", "leak", "hang", "raise"]


def test_without_a_terminal_there_are_plain_lines():
    stream = io.StringIO()
    with views.make_view(stream) as view:
        view.tell(views.Line(text="round 1 finished"))
        view.show(Ledger(rounds=1), (), ())
    assert stream.getvalue().endswith(" round 1 finished\n")
    assert stream.getvalue().count("\n") == 1


def test_a_client_that_said_goodbye_is_not_shown_as_connecting():
    ledger, seen = Ledger(rounds=1), []
    record = ledger.client("client-1")
    seen.append(views._idle(record).plain)
    for event in (
        ev.ClientConnected(client_id="client-1", name="client-1"),
        ev.ClientDisconnected(client_id="client-1", name="client-1", lost=False),
        ev.ClientConnected(client_id="client-1", name="client-1"),
    ):
        ledger.take(event)
        seen.append(views._idle(record).plain)
    assert seen == ["connecting", "waiting", "gone", "waiting"]
