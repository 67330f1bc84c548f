"""State that tasks hand on to each other, for every start method: kept as bytes, and only from tasks that complete."""

from __future__ import annotations

import gc
import subprocess
import sys

import numpy as np
import programs
import pytest
import resident_programs as tasks
from observing import open_descriptors, wait_until

from scaleout_mp import ConfigError, EdgeClient, EndReason, Limits, TaskExecutor
from scaleout_mp.ipc import frames
from scaleout_mp.ipc.frames import Kind


@pytest.fixture(scope="module", params=["template", "spawn"])
def executor(request):
    limits = Limits(abort_grace=0.3)
    with TaskExecutor(start_method=request.param, echo_output=False, limits=limits, state_bytes="8MiB") as running:
        running.submit(programs.echo, 0).result(20)
        yield running


@pytest.fixture
def state(request):
    """A name of the test's own."""
    return request.node.name


def dropped(caplog):
    return [record.message for record in caplog.records if getattr(record, "action", "") == "state_dropped"]


def test_a_task_finds_what_the_one_before_put_there(executor, state):
    results = [executor.submit(tasks.count_in_state, state=state).result(20) for _ in range(4)]
    assert [count for count, _ in results] == [1, 2, 3, 4]
    assert len({pid for _, pid in results}) == 4


def test_states_of_other_names_are_others(executor, state):
    assert executor.submit(tasks.count_in_state, state=state).result(20)[0] == 1
    assert executor.submit(tasks.count_in_state, state=f"{state} too").result(20)[0] == 1


def test_arrays_are_kept_and_their_memory_is_given_back(executor, state):
    before = len(open_descriptors())
    for number in range(4):
        executor.submit(tasks.put_in_state, "weights", np.full(500_000, number), state=state).result(20)
        assert executor.submit(tasks.sum_of_state, "weights", state=state).result(20) == number * 500_000
    gc.collect()
    wait_until(lambda: len(open_descriptors()) <= before + 1, what="one descriptor for the state")


@pytest.mark.parametrize("then", ["raise", "crash", "hang"])
def test_what_a_task_wrote_that_failed_is_dropped_with_a_warning(executor, state, then, caplog):
    for _ in range(2):
        executor.submit(tasks.count_in_state, state=state).result(20)
    task = executor.submit(tasks.count_in_state, then=then, state=state)
    if then == "hang":
        next(task.records())
        task.abort()
    assert not task.report(20).completed
    (said,) = dropped(caplog)
    assert f"state {state} is dropped" in said
    assert executor.submit(tasks.count_in_state, state=state).result(20)[0] == 3


def test_a_failure_that_had_nothing_to_do_with_the_state_says_nothing_of_it(executor, state, caplog):
    executor.submit(tasks.count_in_state, state=state).result(20)
    assert executor.submit(tasks.never_look_at_state, state=state).report(20).reason is EndReason.FAILED
    assert dropped(caplog) == []
    assert executor.submit(tasks.count_in_state, state=state).result(20)[0] == 2


def test_what_cannot_be_pickled_fails_the_task_and_is_named(executor, state):
    executor.submit(tasks.count_in_state, state=state).result(20)
    report = executor.submit(tasks.lock_in_state, state=state).report(20)
    assert (report.reason, report.error_type) == (EndReason.FAILED, "ValueNotSendable")
    assert f"state {state}['lock'], a lock, cannot be kept" in report.message
    assert executor.submit(tasks.keys_of_state, state=state).result(20) == ["count"]


def test_what_is_too_large_fails_the_task(executor, state):
    report = executor.submit(tasks.put_in_state, "x", bytes(9 << 20), state=state).report(20)
    assert (report.reason, report.error_type) == (EndReason.FAILED, "ValueNotSendable")
    assert "at most 8388608 are kept (state_bytes)" in report.message
    assert executor.submit(tasks.keys_of_state, state=state).result(20) == []


def test_what_cannot_be_read_any_more_is_dropped(executor, state, caplog):
    executor.submit(tasks.unreadable_in_state, state=state).report(20)
    report = executor.submit(tasks.keys_of_state, state=state).report(20)
    assert report.reason is EndReason.FAILED
    assert "cannot be read (RuntimeError: not this time); it is dropped" in report.message
    assert any("cannot be read any more" in message for message in dropped(caplog))
    assert executor.submit(tasks.keys_of_state, state=state).result(20) == []


def test_what_ends_the_task_that_reads_it_is_dropped(executor, state, caplog):
    executor.submit(tasks.exit_when_read, state=state).result(20)
    assert executor.submit(tasks.keys_of_state, state=state).report(20).exit_code == 3
    (message,) = dropped(caplog)
    assert message.endswith("ended while it read it: the next one finds it empty")
    assert executor.submit(tasks.keys_of_state, state=state).result(20) == []


def test_what_somebody_did_not_want_to_wait_for_is_kept(executor, state, caplog):
    executor.submit(tasks.sleep_when_read, state=state).result(20)
    task = executor.submit(tasks.keys_of_state, state=state)
    wait_until(lambda: task._execution and task._execution._plan.state._opening, what="a task that reads it")
    task.abort()
    assert task.report(20).reason is EndReason.INTERRUPTED_BY_CLIENT
    assert dropped(caplog) == []
    # The clock of a limit is not somebody: whatever follows would wait as well.
    report = executor.submit(tasks.keys_of_state, state=state, limits=Limits(wall_time=1, abort_grace=0)).report(20)
    assert report.reason is EndReason.WALL_TIME
    assert executor.submit(tasks.keys_of_state, state=state).result(20) == []


def test_a_task_without_a_state_is_told_so(executor):
    report = executor.submit(tasks.keys_of_state).report(20)
    assert "this task keeps no state: submit it with state=NAME" in report.message


def test_in_a_worker_it_is_a_dict_that_stays(executor, state):
    worker = executor.worker(state)
    results = [worker.submit(tasks.count_in_state).result(20) for _ in range(3)]
    assert [count for count, _ in results] == [1, 2, 3]
    assert len({pid for _, pid in results}) == 1
    # There it need not pickle, and a failure does not undo what was done to it.
    worker.submit(tasks.lock_in_state).result(20)
    assert worker.submit(tasks.count_in_state, then="raise").report(20).reason is EndReason.FAILED
    assert worker.submit(tasks.count_in_state).result(20)[0] == 5
    assert executor.submit(tasks.keys_of_state, worker=worker, state="other").result(20) == []
    worker.retire()


@pytest.mark.parametrize(
    ("data", "unsealed"),
    [
        (frames.encode(Kind.STATE), False),
        (frames.encode(Kind.STATE, "stolen", None), False),
        (frames.encode(Kind.STATE, "kept", None), False),
        (frames.encode(Kind.STATE, "kept", [b"a", b"b"]), False),
        (frames.encode(Kind.STATE, "kept", ["text"]), False),
        (frames.encode(Kind.STATE, "kept", [bytes(1 << 16)]), False),
        (frames.encode(Kind.STATE, "kept", [64], descriptors=1), True),
        (frames.encode(Kind.STATE, "opened", None, descriptors=1), True),
    ],
    ids=range(8),
)
def test_a_state_frame_that_does_not_fit_ends_the_task(executor, state, data, unsealed):
    executor.submit(tasks.count_in_state, state=state).result(20)
    before = len(open_descriptors())
    report = executor.submit(tasks.send_state, data, unsealed=unsealed, state=state).report(20)
    assert report.reason is EndReason.PROTOCOL
    assert len(open_descriptors()) <= before
    assert executor.submit(tasks.count_in_state, state=state).result(20)[0] == 2


def test_a_state_frame_of_a_task_without_a_state_ends_it(executor):
    data = frames.encode(Kind.STATE, "opened", None)
    assert executor.submit(tasks.send_state, data).report(20).reason is EndReason.PROTOCOL


def test_classes_of_a_script_are_kept(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from scaleout_mp import TaskExecutor, current_task\n"
        "class Optimiser:\n    steps = 0\n"
        "def train():\n"
        "    optimiser = current_task().state.setdefault('optimiser', Optimiser())\n"
        "    optimiser.steps += 1\n"
        "    return optimiser.steps\n"
        "if __name__ == '__main__':\n"
        "    for method in ('template', 'spawn'):\n"
        "        with TaskExecutor(start_method=method) as executor:\n"
        "            print([executor.submit(train, state='s').result() for _ in range(3)])\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("[1, 2, 3]\n" * 2, "")


def test_a_client_has_its_state_only_in_a_task():
    with pytest.raises(RuntimeError, match="while a callback runs"):
        EdgeClient().state  # noqa: B018

    class Own(EdgeClient):
        def __init__(self):
            super().__init__()
            self.state = "mine"

    assert Own().state == "mine"


@pytest.mark.parametrize("value", ["much", -1, 2**61])
def test_a_wrong_bound_names_its_field(value):
    with pytest.raises(ConfigError, match="state_bytes"):
        TaskExecutor(state_bytes=value)
