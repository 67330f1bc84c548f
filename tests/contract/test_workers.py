"""Workers, for every start method: what stays from task to task, and what does not."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time

import msgpack
import numpy as np
import programs
import pytest
import resident_programs as workers
from observing import gone, open_descriptors, wait_until

from scaleout_mp import ConfigError, EndReason, Limits, ScaleoutModel, TaskExecutor, TaskFailed
from scaleout_mp.executor.report import StopCause
from scaleout_mp.ipc import frames
from scaleout_mp.ipc.frames import MAX_LOADED, Kind
from scaleout_mp.sandbox.cgroup import MemoryGroups
from scaleout_mp.task import StopStage

MIB = 1 << 20


@pytest.fixture(scope="module", params=["template", "spawn"])
def executor(request):
    limits = Limits(abort_grace=1)
    with TaskExecutor(start_method=request.param, isolation="worker", echo_output=False, limits=limits) as running:
        running.submit(programs.echo, 0).result(20)
        yield running


@pytest.fixture
def worker(executor, request):
    """A worker of the test's own, gone when the test is over."""
    before = open_descriptors()
    yield executor.worker(request.node.name)
    executor.retire_worker(request.node.name)
    gc.collect()
    wait_until(lambda: len(open_descriptors()) <= len(before), seconds=4, what=f"no more descriptors than {before}")


def ready(task):
    return next(task.records())


# --- What stays ------------------------------------------------------------------------------------------------------


def test_a_callable_keeps_its_state(worker):
    counter = workers.Counter()
    results = [worker.submit(counter) for _ in range(5)]
    counts, pids = zip(*(task.result(20) for task in results), strict=True)
    assert counts == (1, 2, 3, 4, 5)
    assert len(set(pids)) == 1
    report = results[-1].report()
    assert (report.worker, report.exit_code, report.signal) == (worker.name, None, None)


def test_callables_of_one_worker_share_its_modules(worker):
    first, own = worker.submit(workers.remember, "a").result(20)
    assert worker.submit(workers.remember, "b").result(20) == (["a", "b"], own)
    assert worker.submit(workers.pid).result(20) == own
    assert first == ["a"]


def test_each_callable_has_a_worker_that_is_named_after_it(executor):
    first = executor.submit(workers.pid)
    other = executor.submit(workers.look_once, 0)
    assert first.result(20) == executor.submit(workers.pid).result(20) != other.result(20)
    assert first.report().worker == "resident_programs.pid"
    for name in ("resident_programs.pid", "resident_programs.look_once"):
        executor.retire_worker(name)


def test_a_worker_by_name_where_tasks_have_processes_of_their_own():
    with TaskExecutor(echo_output=False) as running:
        own = running.submit(workers.pid)
        assert own.report(20).worker is None
        assert own.result() != running.submit(workers.pid).result(20)
        assert running.submit(workers.pid, worker="w").result(20) == running.submit(workers.pid, worker="w").result(20)


def test_more_callables_than_are_kept(worker):
    own = worker.submit(workers.pid).result(20)
    callables = [lambda offset=offset: offset for offset in range(MAX_LOADED + 6)]
    assert [worker.submit(function).result(20) for function in callables] == list(range(MAX_LOADED + 6))
    assert worker.submit(callables[0]).result(20) == 0
    assert worker.submit(workers.pid).result(20) == own


def test_a_callable_that_is_too_large_for_a_frame(worker):
    array = np.arange(100_000)
    assert worker.submit(lambda: 1).result(20) == 1
    assert worker.submit(lambda: int(array.sum())).result(20) == array.sum()


def test_models_and_arrays_go_in_and_out(worker):
    model = ScaleoutModel.from_training_model([np.zeros((300, 300), np.float32)])
    own = worker.submit(workers.pid).result(20)
    for step in range(3):
        updated, _ = worker.submit(programs.add_one, model, {"epochs": 1}).result(20)
        model = updated
        np.testing.assert_array_equal(model.get_training_model()[0], np.full((300, 300), step + 1, np.float32))
    array = np.zeros(200_000)
    np.testing.assert_array_equal(worker.submit(workers.own_copy, array).result(20), array + 1)
    assert array.sum() == 0
    assert worker.submit(workers.pid).result(20) == own


# --- Each task is reported by itself ---------------------------------------------------------------------------------


def test_output_and_records_belong_to_their_task(worker):
    tasks = [worker.submit(workers.speak, f"task {number}", number) for number in range(20)]
    for number, task in enumerate(tasks):
        said = f"task {number}"
        assert [(record.metrics, record.step) for record in task.records()] == [({said: 1.0}, number)]
        report = task.report(20)
        assert sorted(report.stdout_tail.splitlines()) == [f"{said} on standard output", f"{said}, raw"]
        assert report.stderr_tail == f"{said} on standard error\n"
        assert report.last_step == number


def test_processor_time_is_counted_for_each_task(executor, worker):
    # A fresh interpreter takes its time to start.
    worker.submit(workers.pid).result(20)
    limits = Limits(cpu_time=0.6)
    tasks = [executor.submit(workers.burn, 0.35, worker=worker, limits=limits) for _ in range(3)]
    assert len({task.result(20) for task in tasks}) == 1
    assert all(0.3 < task.report().cpu_seconds < 0.6 for task in tasks)
    report = executor.submit(workers.burn, 30, worker=worker, limits=limits).report(20)
    assert report.reason is EndReason.CPU_TIME
    assert report.wall_seconds < 10


def test_a_thread_that_stays_cannot_log_for_the_next_task(worker, tmp_path):
    path = tmp_path / "said"
    own = worker.submit(workers.leave_a_thread, str(path)).result(20)
    wait_until(path.exists, seconds=10)
    assert path.read_text() == "\n".join(
        f"{kind}: the task that this thread belongs to is over" for kind in ("old", "new")
    )
    task = worker.submit(workers.speak, "clean", 1)
    assert [record.metrics for record in task.records()] == [{"clean": 1.0}]
    assert worker.submit(workers.pid).result(20) == own


def test_a_fork_that_comes_back_is_not_the_worker(worker):
    own = worker.submit(workers.fork_and_return).result(20)
    assert worker.submit(workers.fork_and_return).result(20) == own


# --- Bad ends --------------------------------------------------------------------------------------------------------


def test_an_exception_leaves_the_worker_alive(worker):
    counter = workers.Counter()
    assert worker.submit(counter).result(20)[0] == 1
    for program in (programs.raise_error, programs.raise_base_exception, programs.system_exit):
        assert worker.submit(program).report(20).reason is EndReason.FAILED
    assert worker.submit(counter).result(20)[0] == 2


def test_what_cannot_come_back_leaves_the_worker_alive(worker):
    own = worker.submit(workers.pid).result(20)
    with pytest.raises(TaskFailed, match=r"a builtins.object cannot be returned"):
        worker.submit(programs.return_object).result(20)
    assert worker.submit(workers.pid).result(20) == own


@pytest.mark.parametrize("program", [programs.segfault, programs.exit_zero, programs.kill_self])
def test_a_crash_costs_its_task_and_what_the_worker_held(worker, program):
    counter = workers.Counter()
    tasks = [worker.submit(function) for function in (counter, counter, program, counter)]
    assert [tasks[0].result(20)[0], tasks[1].result(20)[0], tasks[3].result(20)[0]] == [1, 2, 1]
    report = tasks[2].report()
    assert report.reason is EndReason.CRASHED
    assert any("the next task gets a fresh one" in note for note in report.notes)


def test_a_crash_of_one_worker_is_nothing_to_another(executor, worker, tmp_path):
    counter = workers.Counter()
    beside = executor.worker("beside")
    assert beside.submit(counter).result(20)[0] == 1
    at_work = beside.submit(workers.meet, str(tmp_path), "at work", ["crashed"])
    wait_until((tmp_path / "at work").exists, seconds=20)
    assert worker.submit(programs.segfault).report(20).signal == "SIGSEGV"
    (tmp_path / "crashed").touch()
    assert at_work.result(20)
    assert beside.submit(counter).result(20)[0] == 2
    beside.retire()


def test_a_worker_that_dies_between_two_tasks_costs_none(worker):
    for _ in range(3):
        own = worker.submit(workers.pid).result(20)
        os.kill(own, signal.SIGKILL)
        task = worker.submit(workers.pid)
        assert task.result(20) != own
        assert task.report().notes == ()


def test_a_task_does_not_answer_for_what_earlier_ones_left_that_grows(executor, worker):
    own = worker.submit(os.getpid).result(20)
    # The next one comes, but does not begin.
    os.kill(own, signal.SIGSTOP)
    task = worker.submit(os.getpid)
    wait_until(lambda: stopped(executor), seconds=10)
    (execution,) = stopped(executor)
    cause = StopCause(reason=EndReason.MEMORY_LIMIT, message="passed its memory limit")
    executor._thread.loop.call_soon_threadsafe(lambda: execution._on_breach(cause, graceful=False))
    assert task.result(20) != own
    assert gone(own)


def stopped(executor):
    """Return the tasks that run in a process."""
    return [execution for execution in executor._core._running if execution._process.tree is not None]


def test_a_violation_ends_the_worker(worker):
    own = worker.submit(workers.pid).result(20)
    assert worker.submit(programs.write_raw, b"\xff" * 100).report(20).reason is EndReason.PROTOCOL
    assert worker.submit(workers.pid).result(20) != own


@pytest.mark.parametrize("data", [b"\xff" * 8, frames.encode(Kind.RESULT, [False, [msgpack.packb("spoofed")]])])
def test_who_speaks_between_two_tasks_is_ended(worker, data):
    own = worker.submit(workers.speak_out_of_turn, data).result(20)
    wait_until(lambda: gone(own), seconds=10)
    assert worker.submit(programs.echo, "fine").result(20) == "fine"


# --- Stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", [workers.stop_when_asked, workers.swallow_the_stop])
def test_a_task_that_heeds_its_abort_leaves_the_worker_alive(worker, program):
    counter = workers.Counter()
    assert worker.submit(counter).result(20)[0] == 1
    task = worker.submit(program)
    ready(task)
    task.abort("enough")
    report = task.report(20)
    assert (report.reason, report.stopped_by) == (EndReason.INTERRUPTED_BY_CLIENT, StopStage.ABORT)
    assert report.message == "enough; it ended by itself"
    assert worker.submit(counter).result(20)[0] == 2


def test_a_task_that_does_not_is_killed_with_its_worker(executor, worker):
    own = worker.submit(workers.pid).result(20)
    task = executor.submit(workers.hang, worker=worker, limits=Limits(abort_grace=0.4))
    ready(task)
    task.abort()
    report = task.report(20)
    assert report.stopped_by is StopStage.SIGKILL
    assert "in hang" in report.stacks
    assert gone(own)
    assert worker.submit(workers.pid).result(20) != own


def test_an_abort_that_comes_late_does_not_hit_the_next_task(worker):
    own = worker.submit(workers.pid).result(20)
    for _ in range(60):
        first, second = worker.submit(workers.look_once, 0), worker.submit(workers.look_once, 0)
        first.abort()
        assert first.report(20).reason in {EndReason.INTERRUPTED_BY_CLIENT, EndReason.COMPLETED}
        assert second.result(20) == own


def test_a_waiting_task_can_be_aborted(worker):
    first = worker.submit(workers.stop_when_asked)
    ready(first)
    second, third = worker.submit(programs.echo, 2), worker.submit(programs.echo, 3)
    second.abort()
    assert second.report(20).message == "Aborted by client; it was never started"
    assert third.state == "pending"
    first.abort()
    assert third.result(20) == 3


# --- Limits ----------------------------------------------------------------------------------------------------------


def test_wall_time_ends_the_worker(executor, worker):
    own = worker.submit(workers.pid).result(20)
    limits = Limits(wall_time=0.3, abort_grace=1)
    report = executor.submit(workers.stop_when_asked, worker=worker, limits=limits).report(20)
    assert (report.reason, report.stopped_by) == (EndReason.WALL_TIME, StopStage.ABORT)
    assert worker.submit(workers.pid).result(20) != own


def test_no_progress_is_looked_at_for_each_task(executor, worker):
    limits = Limits(no_progress=0.5, abort_grace=0.2)
    own = executor.submit(programs.look_busy, 0.8, worker=worker, limits=limits)
    assert own.result(20) == "busy"
    report = executor.submit(programs.silent_after_one_metric, worker=worker, limits=limits).report(20)
    assert report.reason is EndReason.NO_PROGRESS
    assert "in wait_for_godot" in report.stacks


def test_memory_that_tasks_keep_adds_up(executor, worker):
    limits = Limits(memory="160MiB")
    own = executor.submit(workers.hold, 60, worker=worker, limits=limits).result(20)
    report = executor.submit(programs.allocate, worker=worker, limits=limits).report(20)
    assert report.reason is EndReason.MEMORY_LIMIT
    assert executor.submit(workers.hold, 60, worker=worker, limits=limits).result(20) != own


def test_an_allocation_that_is_refused_ends_the_worker(executor, worker):
    limits = Limits(memory="256MiB")
    own = executor.submit(workers.pid, worker=worker, limits=limits).result(20)
    report = executor.submit(programs.memory_error, worker=worker, limits=limits).report(20)
    assert report.reason is EndReason.MEMORY_LIMIT
    assert executor.submit(workers.pid, worker=worker, limits=limits).result(20) != own


def test_a_task_does_not_pay_for_a_child_of_the_one_before(executor, worker):
    limits = Limits(memory="96MiB")
    report = executor.submit(programs.raise_for_a_child_that_is_too_large, worker=worker, limits=limits).report(20)
    assert report.reason is EndReason.MEMORY_LIMIT, report
    after = executor.submit(programs.look_busy, 0.5, worker=worker, limits=limits).report(20)
    assert after.completed, after


def test_other_limits_of_the_process_want_another_process(executor, worker):
    def own(**limits):
        return executor.submit(workers.pid, worker=worker, limits=Limits(**limits)).result(20)

    first = own(memory="256MiB")
    assert own(memory="256MiB", wall_time=30, abort_grace=1) == first
    second = own(memory="300MiB")
    assert second != first
    wait_until(lambda: gone(first), seconds=10)
    assert own(memory="300MiB") == second


def test_without_a_cgroup_a_worker_is_watched_between_tasks(monkeypatch):
    def refuse():
        raise OSError("no cgroups here")

    def grow_later():
        def grow():
            time.sleep(0.2)
            programs.allocate()

        threading.Thread(target=grow, daemon=True).start()
        return os.getpid()

    monkeypatch.setattr(MemoryGroups, "find", refuse)
    with TaskExecutor(isolation="worker", echo_output=False, limits=Limits(memory="128MiB")) as running:
        own = running.submit(grow_later, worker="w").result(20)
        wait_until(lambda: gone(own), seconds=10)
        assert running.submit(workers.pid, worker="w").result(20) != own


# --- The worker itself -----------------------------------------------------------------------------------------------


def test_a_worker_is_set_up_once_for_each_process(executor, tmp_path):
    path = tmp_path / "pids"
    value = np.ones(100_000)
    worker = executor.worker("with set-up", set_up=workers.set_up, args=(value,), kwargs={"path": str(path)})
    own = worker.submit(workers.use_set_up).result(20)[2]
    assert worker.submit(workers.use_set_up).result(20) == (100_000.0, 1, own)
    assert worker.submit(programs.segfault).report(20).reason is EndReason.CRASHED
    total, count, other = worker.submit(workers.use_set_up).result(20)
    assert (total, count) == (100_000.0, 1)
    assert path.read_text().split() == [str(own), str(other)]
    worker.retire()


def test_a_worker_that_cannot_be_set_up_fails_the_task(executor):
    worker = executor.worker("broken", set_up=workers.fail_to_set_up)
    for _ in range(2):
        task = worker.submit(workers.pid)
        report = task.report(20)
        assert report.reason is EndReason.FAILED
        assert "its worker could not be set up" in report.message
        assert "no weights here" in report.message
        assert "fail_to_set_up" in report.traceback
        assert report.task_id == task.task_id
    worker.retire()


def test_a_task_whose_worker_hangs_in_its_set_up_can_be_aborted(executor):
    worker = executor.worker("hanging", set_up=workers.hang, limits=Limits(abort_grace=0.4))
    task = worker.submit(workers.pid)
    ready(task)
    started = time.monotonic()
    task.abort()
    assert task.report(20).reason is EndReason.INTERRUPTED_BY_CLIENT
    assert time.monotonic() - started < 3


def test_several_processes_serve_one_worker(executor, tmp_path):
    worker = executor.worker("pair", processes=2)
    tasks = [worker.submit(workers.meet, str(tmp_path), name, "ab") for name in "ab"]
    assert len({task.result(20) for task in tasks}) == 2
    pids = {worker.submit(workers.pid).result(20) for _ in range(4)}
    assert pids <= {task.result() for task in tasks}
    worker.retire()


def test_a_worker_with_nothing_to_do_is_ended(executor, tmp_path):
    path = tmp_path / "exited"
    worker = executor.worker("short-lived", idle_time=0.2)
    own = worker.submit(workers.mark_exit, str(path)).result(20)
    wait_until(lambda: gone(own), seconds=10)
    # It left as a program does.
    assert path.exists()
    assert worker.submit(workers.pid).result(20) != own
    worker.retire()


def test_a_child_that_a_task_leaves_stays_as_long_as_the_worker(worker):
    child = worker.submit(workers.leave_a_child).result(20)
    own = worker.submit(workers.pid).result(20)
    assert not gone(child)
    worker.retire()
    wait_until(lambda: gone(own) and gone(child), seconds=10)


def test_nothing_is_left_when_the_executor_ends():
    with TaskExecutor(isolation="worker", echo_output=False) as running:
        pids = [running.submit(workers.pid, worker=name).result(20) for name in "abc"]
        pids.append(running.submit(workers.leave_a_child, worker="a").result(20))
    assert all(gone(pid) for pid in pids)


def test_a_template_that_dies_takes_its_workers_along():
    with TaskExecutor(isolation="worker", echo_output=False) as running:
        about = running.submit(programs.describe_process, worker="w").result(20)
        os.kill(about["parent"], signal.SIGKILL)
        wait_until(lambda: gone(about["pid"]), seconds=10)
        assert running.submit(workers.pid, worker="w").result(20) != about["pid"]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": 3}, "name"),
        ({"name": "w", "processes": 0}, "processes"),
        ({"name": "w", "processes": True}, "processes"),
        ({"name": "w", "idle_time": -1}, "idle_time"),
        ({"name": "w", "idle_time": "soon"}, "idle_time"),
    ],
)
def test_a_wrong_option_names_its_field(executor, options, field):
    with pytest.raises(ConfigError, match=field):
        executor.worker(**options)


def test_a_mode_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match="isolation"):
        TaskExecutor(isolation="thread")


@pytest.mark.parametrize("sandbox", ["none", "basic", "auto", "strict"])
def test_at_every_level_a_worker_keeps_its_state_and_is_replaced(sandbox):
    with TaskExecutor(sandbox=sandbox, echo_output=False, limits=Limits(memory="256MiB", abort_grace=0.4)) as running:
        worker = running.worker("w", set_up=workers.set_up, args=(np.ones(3),))
        counter = workers.Counter()
        assert [worker.submit(counter).result(20)[0] for _ in range(3)] == [1, 2, 3]
        assert worker.submit(workers.use_set_up).result(20)[:2] == (3.0, 1)
        task = worker.submit(workers.stop_when_asked)
        ready(task)
        task.abort()
        assert task.report(20).stopped_by is StopStage.ABORT
        assert worker.submit(counter).result(20)[0] == 4
        for program, reason in (
            (programs.segfault, EndReason.CRASHED),
            (programs.allocate, EndReason.MEMORY_LIMIT),
            (workers.hang, EndReason.INTERRUPTED_BY_CLIENT),
        ):
            task = worker.submit(program)
            if program is workers.hang:
                ready(task)
                task.abort()
            assert task.report(20).reason is reason
            assert worker.submit(counter).result(20)[0] == 1
        assert running.submit(tasks_state, state="s").result(20) == 1
        assert running.submit(tasks_state, state="s").result(20) == 2


def tasks_state():
    return workers.count_in_state()[0]
