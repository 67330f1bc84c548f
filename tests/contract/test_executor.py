"""One suite for every start method: what a task may do, and what comes of it."""

from __future__ import annotations

import gc
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time

import module_with_folder
import msgpack
import numpy as np
import programs
import psutil
import pytest
from observing import open_descriptors, wait_until

from scaleout_mp import (
    CallbackNotSendable,
    EndReason,
    Limits,
    ScaleoutModel,
    TaskCrashed,
    TaskExecutor,
    TaskFailed,
    TaskKilled,
)
from scaleout_mp.errors import ValueNotSendable
from scaleout_mp.ipc import frames
from scaleout_mp.ipc.frames import Kind
from scaleout_mp.sandbox.cgroup import MemoryGroups, remove_left_over
from scaleout_mp.task import AttributesRecord, MetricRecord, StopStage, TelemetryRecord

MIB = 1 << 20


@pytest.fixture(scope="module", params=["template", "spawn"])
def executor(request):
    with TaskExecutor(start_method=request.param, echo_output=False, limits=Limits(abort_grace=1)) as running:
        running.submit(programs.echo, 0).result(20)
        yield running


@pytest.fixture(autouse=True)
def same_descriptors(executor):
    before = open_descriptors()
    yield
    gc.collect()
    wait_until(lambda: len(open_descriptors()) <= len(before), seconds=3, what=f"no more descriptors than {before}")


def ready(task):
    """Wait for the task's first record."""
    return next(task.records())


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# --- What comes back -------------------------------------------------------------------------------------------------


def test_a_model_goes_in_and_a_model_comes_out(executor):
    model = ScaleoutModel.from_training_model([np.zeros((300, 300), np.float32), np.arange(3)])
    task = executor.submit(programs.add_one, model, {"epochs": 3})
    records = list(task.records())
    updated, meta = task.result(20)
    assert [(record.metrics, record.step) for record in records] == [
        ({"loss": 1.0}, 0),
        ({"loss": 0.5}, 1),
        ({"loss": 1 / 3}, 2),
    ]
    assert all(isinstance(record, MetricRecord) and abs(record.timestamp - time.time()) < 20 for record in records)
    assert meta == {"training_metadata": {"num_examples": 7}}
    assert updated.model_id != model.model_id
    np.testing.assert_array_equal(updated.get_training_model()[0], np.ones((300, 300), np.float32))
    report = task.report()
    assert report.reason is EndReason.COMPLETED
    assert report.last_step == 2
    assert report.exit_code == 0
    assert report.cpu_seconds > 0
    assert report.max_rss > MIB


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -5,
        2**63,
        1.5,
        float("inf"),
        "text ü",
        b"bytes",
        [1, [2, ()]],
        (1, "a", (None,)),
        {"a": {1: [b"x"]}},
        list(range(100_000)),
        "x" * 3_000_000,
    ],
    ids=lambda value: repr(value)[:20],
)
def test_plain_values_come_back_equal(executor, value):
    assert executor.submit(programs.echo, value).result(20) == value


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12).reshape(3, 4),
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.array(2.5),
        np.empty((0, 3), np.int8),
        np.random.default_rng(1).random((500, 500)),
        np.array(["a", "bc"]),
        np.array(["2020-01-01"], dtype="datetime64[D]"),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_come_back_equal_and_writable(executor, array):
    back = executor.submit(programs.echo, {"array": array}).result(20)["array"]
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.flags.f_contiguous == array.flags.f_contiguous
    np.testing.assert_array_equal(back, array)
    if back.size and back.dtype.kind == "f":
        back += 1


def test_arguments_can_be_changed_without_changing_the_callers(executor):
    array = np.zeros((1000, 100))
    back = executor.submit(programs.mutate, array).result(20)
    assert back.sum() == array.size
    assert array.sum() == 0


def test_what_cannot_come_back_names_its_type(executor):
    with pytest.raises(TaskFailed, match=r"a builtins.object cannot be returned from a task") as caught:
        executor.submit(programs.return_object).result(20)
    assert caught.value.report.error_type == "ValueNotSendable"


def test_closures_and_lambdas_go_in(executor):
    offset = 3
    assert executor.submit(lambda value: value + offset, 4).result(20) == 7


def test_a_callable_that_cannot_be_sent_names_what_it_captures(executor):
    lock = threading.Lock()
    settings = {"lock": lock}

    def train():
        return settings

    with pytest.raises(CallbackNotSendable) as caught:
        executor.submit(train)
    assert "train" in caught.value.callback
    assert caught.value.culprit == "settings['lock'], a _thread.lock"
    assert "inside the callback" in str(caught.value)


def test_an_argument_that_cannot_be_sent_is_named(executor):
    with pytest.raises(
        ValueNotSendable, match=r"argument 1 cannot be sent to a task process: TypeError: cannot pickle"
    ):
        executor.submit(programs.echo, 1, threading.Lock())


def test_a_model_from_a_file_is_mapped_by_the_child(executor, tmp_path):
    weights = [np.random.default_rng(0).random((1000, 1000))]
    ScaleoutModel.from_training_model(weights).save_to_file(tmp_path / "seed.scm")

    def own_memory(model):
        (array,) = model.get_training_model()
        total = float(array.sum())
        with open("/proc/self/smaps") as file:
            mapped = file.read()
        return total, array.flags.writeable, "seed.scm" in mapped

    with ScaleoutModel.from_file(tmp_path / "seed.scm") as model:
        assert executor.submit(own_memory, model).result(20) == (pytest.approx(weights[0].sum()), False, True)


def test_a_model_that_the_task_returns_unchanged_is_copied_into_sealed_memory(executor, tmp_path):
    ScaleoutModel.from_training_model([np.ones(3)]).save_to_file(tmp_path / "seed.scm")
    with ScaleoutModel.from_file(tmp_path / "seed.scm") as model:
        back = executor.submit(programs.echo, model).result(20)
        assert back.checksum == model.checksum


# --- The process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start_method", ["template", "spawn"])
def test_the_process_is_light_and_clean(start_method):
    with TaskExecutor(start_method=start_method) as fresh:
        about = fresh.submit(programs.describe_process).result(20)
    assert about["pid"] not in {os.getpid(), about["parent"]}
    assert about["session"] == about["pid"]
    assert about["sigterm"]
    heavy = {"grpc", "psutil", "cryptography", "requests", "google.protobuf", "cloudpickle", "asyncio"}
    assert heavy.isdisjoint(about["modules"])
    targets = about["descriptors"]
    assert targets["0"] == "/dev/null"
    assert set(targets) <= {"0", "1", "2", "3", "4", "5"}  # 5 is the listing itself
    assert targets["3"].startswith("socket:")
    assert targets["4"] == "/memfd:scaleout-stacks (deleted)"


def test_tasks_do_not_share_random_numbers(executor):
    tasks = [executor.submit(programs.numpy_random) for _ in range(3)]
    assert len({task.result(20) for task in tasks}) == 3


def test_a_fork_of_a_task_has_no_channel(executor):
    assert executor.submit(programs.fork_and_log).result(20) == 0


def test_output_is_in_the_report(executor):
    report = executor.submit(programs.print_much, 2_000).report(20)
    assert report.stdout_tail.endswith("line 1999 of standard output\n")
    assert len(report.stdout_tail) <= 8192
    assert report.stdout_tail.startswith("line ")
    assert report.stderr_tail == "an error\n"


# --- Bad ends --------------------------------------------------------------------------------------------------------


def test_an_exception_is_reported_with_its_traceback(executor):
    with pytest.raises(TaskFailed, match="raised ValueError: the learning rate is negative") as caught:
        executor.submit(programs.raise_error).result(20)
    report = caught.value.report
    assert report.reason is EndReason.FAILED
    assert report.error_type == "ValueError"
    assert 'raise ValueError("the learning rate is negative")' in report.traceback
    assert "scaleout_mp/worker" not in report.traceback


@pytest.mark.parametrize(
    ("program", "error_type"), [(programs.raise_base_exception, "BaseException"), (programs.system_exit, "SystemExit")]
)
def test_what_is_no_exception_still_fails_the_task(executor, program, error_type):
    report = executor.submit(program).report(20)
    assert (report.reason, report.error_type) == (EndReason.FAILED, error_type)


def test_a_segfault_is_a_crash_with_the_python_stack(executor):
    with pytest.raises(TaskCrashed, match="crashed with SIGSEGV") as caught:
        executor.submit(programs.segfault).result(20)
    report = caught.value.report
    assert report.signal == "SIGSEGV"
    assert report.exit_code is None
    assert "in segfault" in report.traceback
    assert report.stdout_tail == "about to crash\n"


def test_exit_code_zero_without_a_result_is_a_failure(executor):
    report = executor.submit(programs.exit_zero).report(20)
    assert (report.reason, report.exit_code) == (EndReason.CRASHED, 0)
    assert "exited with code 0 before it returned a result" in report.message


def test_metrics_just_before_a_sigkill_arrive(executor):
    task = executor.submit(programs.kill_self)
    assert [(record.metrics, record.step) for record in task.records()] == [({"last": 1.0}, 41)]
    report = task.report()
    assert (report.reason, report.signal, report.last_step) == (EndReason.CRASHED, "SIGKILL", 41)
    assert report.stopped_by is None


@pytest.mark.parametrize("limits", [Limits(), Limits(file_size=4096)], ids=["ring", "no ring"])
def test_all_that_was_logged_before_a_sigkill_counts_and_keeps_its_order(executor, limits):
    task = executor.submit(programs.log_much_and_die, 5000, limits=limits)
    expected = []
    for step in range(5000):
        expected.append(step)
        if step % 100 == 0:
            expected += [{"step": str(step)}, {"step": float(step)}]
    seen = []
    for record in task.records():
        match record:
            case MetricRecord(step=step):
                seen.append(step)
            case AttributesRecord(attributes=attributes):
                seen.append(attributes)
            case TelemetryRecord(telemetry=telemetry):
                seen.append(telemetry)
    assert seen == expected
    assert task.report().signal == "SIGKILL"
    assert task.report().last_step == 4999


def test_many_metrics_before_a_sigkill_arrive_in_order(executor):
    task = executor.submit(programs.log_many, 20_000)
    assert [record.step for record in task.records()] == list(range(20_000))


def test_a_result_survives_a_crash_at_exit(executor):
    task = executor.submit(programs.crash_at_exit)
    assert task.result(20) == "safe"
    assert task.report().notes == ("its process ended with SIGSEGV after the result was in",)


def test_a_result_survives_threads_that_never_end(executor):
    started = time.monotonic()
    task = executor.submit(programs.linger)
    assert task.result(20) == "in time"
    assert 1.5 < time.monotonic() - started < 6
    assert task.report().notes == ("its process ended with SIGKILL after the result was in",)


def test_a_daemon_that_a_task_leaves_behind_is_killed(executor, tmp_path):
    task = executor.submit(programs.leave_daemon, str(tmp_path / "pid"))
    assert task.result(20) == "done"
    assert gone(int((tmp_path / "pid").read_text()))
    assert task.report().notes == ("1 process that it left behind had to be killed",)


# --- Limits ----------------------------------------------------------------------------------------------------------


def test_a_task_that_allocates_as_fast_as_it_can_is_stopped(executor):
    before = psutil.Process().memory_info().rss
    with pytest.raises(TaskKilled, match="memory limit") as caught:
        executor.submit(programs.allocate, limits=Limits(memory="256MiB")).result(30)
    report = caught.value.report
    assert report.reason is EndReason.MEMORY_LIMIT
    assert report.memory_limit == 256 * MIB
    assert 200 * MIB < report.peak_memory < 400 * MIB
    assert psutil.Process().memory_info().rss - before < 16 * MIB


@pytest.fixture
def without_cgroup(monkeypatch):
    """An executor on a machine where no memory cgroup can be made."""

    def refuse():
        raise OSError("no cgroups here")

    monkeypatch.setattr(MemoryGroups, "find", refuse)
    with TaskExecutor(echo_output=False) as running:
        yield running


@pytest.mark.parametrize("program", [programs.allocate, programs.allocate_in_children])
def test_without_a_cgroup_the_watchdog_keeps_the_limit(without_cgroup, program):
    report = without_cgroup.submit(program, limits=Limits(memory="192MiB")).report(30)
    assert report.reason is EndReason.MEMORY_LIMIT
    assert report.stopped_by is StopStage.SIGKILL
    assert 192 * MIB < report.peak_memory < 300 * MIB


@pytest.fixture
def memory_groups():
    try:
        groups = MemoryGroups.find()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made: {error}")
    yield groups
    groups.close()


def test_with_a_cgroup_the_kernel_keeps_the_limit_to_the_page(executor, memory_groups):
    report = executor.submit(programs.allocate, limits=Limits(memory="192MiB")).report(30)
    assert report.reason is EndReason.MEMORY_LIMIT
    assert report.peak_memory <= 193 * MIB
    folder = os.path.dirname(memory_groups.base)
    left = [name for name in os.listdir(folder) if name.startswith(f"scaleout-mp-{os.getpid()}-")]
    assert os.path.basename(memory_groups.base) in left
    groups = [entry.name for name in left for entry in os.scandir(f"{folder}/{name}") if entry.is_dir()]
    assert [name for name in groups if not name.startswith("template-")] == []


def test_groups_of_dead_supervisors_are_removed(memory_groups):
    with subprocess.Popen(["true"]) as dead:
        pass
    folder = f"{os.path.dirname(memory_groups.base)}/scaleout-mp-{dead.pid}-0badcafe"
    os.makedirs(f"{folder}/task")
    remove_left_over(memory_groups.base)
    assert not os.path.exists(folder)
    assert os.path.exists(memory_groups.base)


def test_memory_of_children_counts(executor):
    report = executor.submit(programs.allocate_in_children, limits=Limits(memory="192MiB")).report(30)
    assert report.reason is EndReason.MEMORY_LIMIT
    assert report.peak_memory >= 191 * MIB


def test_an_allocation_that_is_refused_is_the_memory_limit(executor):
    report = executor.submit(programs.memory_error, limits=Limits(memory="256MiB")).report(20)
    assert report.reason is EndReason.MEMORY_LIMIT
    assert "ran out of memory" in report.message
    assert "programs.py" in report.traceback


@pytest.mark.parametrize(
    "program",
    [
        programs.memory_error_in_a_group,
        programs.memory_error_as_a_cause,
        programs.raise_for_a_child_that_is_too_large,
    ],
)
def test_an_error_that_comes_of_the_memory_limit_is_reported_as_that(executor, program):
    report = executor.submit(program, limits=Limits(memory="64MiB")).report(20)
    assert report.reason is EndReason.MEMORY_LIMIT, report


def test_a_memory_error_that_was_got_over_is_not_the_end(executor):
    report = executor.submit(programs.memory_error_that_is_got_over, limits=Limits(memory="64MiB")).report(20)
    assert (report.reason, report.error_type) == (EndReason.FAILED, "ValueError")


def test_a_memory_error_without_a_limit_is_the_tasks_own(executor):
    assert executor.submit(programs.memory_error).report(20).reason is EndReason.FAILED


def test_a_task_within_its_limit_is_left_alone(executor):
    model = ScaleoutModel.from_training_model([np.ones(40 * MIB // 8)])
    limits = Limits(memory="96MiB")

    def read_it_all(model):
        total = sum(float(array.sum()) for array in model.get_training_model())
        time.sleep(0.3)
        return total

    # The model's pages are shared: read, but not the task's own.
    assert executor.submit(read_it_all, model, limits=limits).result(20) == 40 * MIB // 8


def test_wall_time(executor):
    started = time.monotonic()
    # Long enough for a fresh interpreter on a busy machine to come to where SIGTERM ends it.
    report = executor.submit(programs.spin, limits=Limits(wall_time=0.5, abort_grace=4)).report(20)
    assert report.reason is EndReason.WALL_TIME
    assert report.stopped_by is StopStage.SIGTERM
    assert "wall-clock limit of 0.5 s" in report.message
    assert 0.5 <= time.monotonic() - started < 5.5


def test_processor_time_of_the_tree(executor):
    report = executor.submit(programs.burn_in_children, limits=Limits(cpu_time=0.6)).report(20)
    assert report.reason is EndReason.CPU_TIME
    assert report.message == "used more than its 0.6 s of processor time; killed with SIGKILL"
    assert report.wall_seconds < 5


def test_processes_and_threads_of_the_tree(executor):
    report = executor.submit(programs.fork_many, 8, limits=Limits(pids=5, threads=1)).report(20)
    assert report.reason is EndReason.PIDS
    assert "its limit is 5" in report.message


def test_the_size_of_a_file(executor, tmp_path):
    limits = Limits(file_size="1MiB")
    assert executor.submit(programs.write_file, str(tmp_path / "a"), MIB, limits=limits).result(20) == MIB
    report = executor.submit(programs.write_file, str(tmp_path / "b"), MIB + 1, limits=limits).report(20)
    assert report.reason is EndReason.FILE_SIZE
    assert (tmp_path / "b").stat().st_size == MIB


def test_a_task_may_have_as_many_open_files_as_this_process_and_cannot_raise_it(executor):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lower = min(soft, 512)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lower, hard))
    try:
        assert executor.submit(resource.getrlimit, resource.RLIMIT_NOFILE).result(20) == (lower, lower)
        asked = executor.submit(resource.getrlimit, resource.RLIMIT_NOFILE, limits=Limits(open_files=soft))
        assert asked.result(20) == (soft, soft)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_open_files(executor):
    assert executor.submit(programs.open_files, 20, limits=Limits(open_files=64)).result(20) == 20
    report = executor.submit(programs.open_files, 80, limits=Limits(open_files=64)).report(20)
    assert report.reason is EndReason.OPEN_FILES


def test_no_progress_ends_a_task_and_says_where_it_was(executor):
    task = executor.submit(programs.silent_after_one_metric, limits=Limits(no_progress=0.5, abort_grace=0.2))
    report = task.report(20)
    assert report.reason is EndReason.NO_PROGRESS
    assert "showed no progress for 0.5 s" in report.message
    assert "in wait_for_godot" in report.stacks


def test_a_look_at_the_abort_is_progress(executor):
    assert executor.submit(programs.look_busy, 1.0, limits=Limits(no_progress=0.4)).result(20) == "busy"


def test_how_much_output_is_kept(executor):
    report = executor.submit(programs.print_much, 200, limits=Limits(output_bytes=100)).report(20)
    assert report.stdout_tail.endswith("line 198 of standard output\nline 199 of standard output\n")
    assert len(report.stdout_tail) <= 100
    assert "of its output are not in this report" in report.notes[0]


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_of_numerical_libraries(executor, threads):
    pytest.importorskip("threadpoolctl", reason="threadpoolctl, which tells how many threads there are, is missing")
    counts, variable = executor.submit(programs.blas_threads, limits=Limits(threads=threads)).result(20)
    assert (counts, variable) == ([threads], str(threads))


# --- Stopping --------------------------------------------------------------------------------------------------------


def test_abort_lets_the_callback_clean_up(executor):
    task = executor.submit(programs.stop_when_asked)
    ready(task)
    task.abort("enough")
    assert [record.metrics for record in task.records()] == [{"cleaned up": 1.0}]
    report = task.report(20)
    assert (report.reason, report.stopped_by) == (EndReason.INTERRUPTED_BY_CLIENT, StopStage.ABORT)
    assert report.message == "enough; it ended by itself"


def test_a_result_after_an_abort_does_not_count(executor):
    task = executor.submit(programs.return_while_stopping)
    ready(task)
    task.abort()
    with pytest.raises(TaskKilled):
        task.result(20)


def test_sigterm_is_the_second_rung(executor, tmp_path):
    task = executor.submit(programs.save_on_sigterm, str(tmp_path / "saved"))
    ready(task)
    task.abort()
    assert task.report(20).stopped_by is StopStage.SIGTERM
    assert (tmp_path / "saved").read_text() == "saved"


@pytest.mark.parametrize("program", [programs.hold_gil, programs.sleep_in_c, programs.spin])
def test_a_hung_task_is_gone_within_its_grace(executor, program):
    task = executor.submit(program, limits=Limits(abort_grace=0.4))
    wait_until(lambda: task.state == "running", seconds=20)
    started = time.monotonic()
    task.abort()
    report = task.report(20)
    assert time.monotonic() - started < 1.4
    assert report.reason is EndReason.INTERRUPTED_BY_CLIENT
    if report.start_method == "template":
        # A fresh interpreter may not have come so far.
        assert f"in {program.__name__}" in report.stacks


def test_a_family_that_ignores_everything_is_gone_within_the_grace(executor, tmp_path):
    task = executor.submit(programs.hang_with_family, str(tmp_path / "pids"), limits=Limits(abort_grace=0.5))
    ready(task)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 3
    assert not any(gone(pid) for pid in pids)
    started = time.monotonic()
    task.abort()
    report = task.report(20)
    assert time.monotonic() - started < 1.5
    assert report.stopped_by is StopStage.SIGKILL
    assert all(gone(pid) for pid in pids)


def test_abort_of_a_task_that_ended_changes_nothing(executor):
    task = executor.submit(programs.echo, 1)
    assert task.result(20) == 1
    task.abort()
    assert task.report().reason is EndReason.COMPLETED


def test_abort_twice_reports_once_with_the_first_reason(executor):
    task = executor.submit(programs.stop_when_asked)
    ready(task)
    task.abort("first")
    task.abort("second")
    assert task.report(20).message.startswith("first")


# --- A child that breaks the rules -----------------------------------------------------------------------------------


def raw_frame(*parts):
    body = msgpack.packb(list(parts))
    return struct.pack("<I", len(body)) + body


RESULT = frames.encode(Kind.RESULT, [False, [msgpack.packb("spoofed")]])
RESULT_OF_NOTHING = frames.encode(
    Kind.RESULT,
    [False, [msgpack.packb(msgpack.ExtType(2, msgpack.packb(["S0", [1 << 50], "C", 1]))), b""]],
)


def nested(depth):
    packed = msgpack.packb([])
    for _ in range(depth):
        packed = msgpack.packb([msgpack.ExtType(1, packed)])
    return packed


RESULT_TOO_DEEP = frames.encode(Kind.RESULT, [False, [nested(400)]])


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<I", 1 << 31),
        struct.pack("<I", 3) + b"\xc1\xc1\xc1",
        raw_frame("metric", 0),
        raw_frame(999, 0),
        raw_frame(int(Kind.METRIC), 0, {"a": "b"}, 0, None, 1.0),
        raw_frame(int(Kind.METRIC), 0, {"a": 1.0}, -1, None, 1.0),
        raw_frame(int(Kind.METRIC), 0, {"a": 1.0}, 0, None, float("nan")),
        raw_frame(int(Kind.METRIC), 0, {"a" * 5000: 1.0}, 0, None, 1.0),
        raw_frame(int(Kind.METRIC), 1, {"a": 1.0}, 0, None, 1.0),
        raw_frame(int(Kind.LOG), 0, b"\xff", 10, "x", 1.0),
        raw_frame(int(Kind.RESULT), 0),
        raw_frame(int(Kind.RESULT), 0, [True, [5]]),
        raw_frame(int(Kind.RESULT), 0, [False, [msgpack.packb(msgpack.ExtType(3, b"\x00"))]]),
        raw_frame(
            int(Kind.RESULT),
            0,
            [False, [msgpack.packb(msgpack.ExtType(2, msgpack.packb(["|O", [1], "C", 1]))), b"12345678"]],
        ),
        raw_frame(int(Kind.EXITED), 0, "x", {}),
        RESULT_TOO_DEEP,
        RESULT_OF_NOTHING,
    ],
    ids=range(17),
)
def test_a_violation_ends_the_task_and_nothing_else(executor, data):
    report = executor.submit(programs.write_raw, data).report(20)
    assert report.reason is EndReason.PROTOCOL, report
    assert executor.submit(programs.echo, "fine").result(20) == "fine"


def test_a_replayed_result_changes_nothing(executor):
    other = frames.encode(Kind.RESULT, [False, [msgpack.packb("other")]])
    assert executor.submit(programs.write_raw, RESULT + other).result(20) == "spoofed"


def test_tuples_that_are_nested_too_deep_are_refused_where_they_are_made(executor):
    report = executor.submit(programs.deep_tuple, 300).report(20)
    assert (report.reason, report.error_type) == (EndReason.FAILED, "ValueNotSendable")
    assert executor.submit(programs.deep_tuple, 50).result(20)


# --- What callbacks do to themselves -------------------------------------------------------------------------------


def test_a_fork_that_comes_back_is_not_the_task(executor):
    for program in (programs.fork_return, programs.fork_exit, programs.fork_raise):
        assert executor.submit(program).result(20) == "parent"


def test_exit_handlers_of_the_template_are_not_run(executor):
    folders = {executor.submit(module_with_folder.use).result(20) for _ in range(3)}
    if executor.submit(programs.echo, 0).report(20).start_method == "template":
        assert len(folders) == 1


def test_signals_that_user_code_takes_while_it_is_loaded_do_not_hide_the_end_of_tasks(executor):
    assert executor.submit(programs.TakesSignals()).result(20) == "ran"


def test_slips_in_logging_raise_where_they_are_made(executor):
    for arguments in ((-1, "x"), (True, "x"), (0, "x" * 2000)):
        report = executor.submit(programs.log_metric, *arguments).report(20)
        assert (report.reason, report.error_type) == (EndReason.FAILED, "ValueError"), report


def test_too_many_keys_at_once_raise_where_they_are_logged(executor):
    report = executor.submit(programs.log_many_keys, 5_000).report(20)
    assert (report.reason, report.error_type) == (EndReason.FAILED, "ValueError")
    assert "5000 keys" in report.message


def test_a_memory_limit_leaves_room_for_threads_that_do_nothing(executor):
    assert executor.submit(programs.idle_threads, 40, limits=Limits(memory="64MiB", threads=1)).result(20) == 40


def test_large_arguments_are_not_the_tasks_own_memory(executor):
    array = np.ones(50 * MIB // 8)
    total = executor.submit(np.sum, array, limits=Limits(memory="32MiB")).result(20)
    assert total == array.size


def test_a_pool_in_a_task_finds_functions_of_the_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, concurrent.futures\n"
        "from scaleout_mp import TaskExecutor\n"
        "def work(x):\n    return x + 1\n"
        "def train(kind):\n"
        "    with multiprocessing.get_context(kind).Pool(2) as pool:\n"
        "        return pool.map(work, [1, 2])\n"
        "if __name__ == '__main__':\n"
        "    for method in ('template', 'spawn'):\n"
        "        with TaskExecutor(start_method=method) as executor:\n"
        "            for kind in ('fork', 'spawn'):\n"
        "                print(executor.submit(train, kind).result())\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("[2, 3]\n" * 4, "")


def test_the_users_folder_does_not_stand_in_for_the_standard_library(tmp_path, monkeypatch):
    (tmp_path / "random.py").write_text("raise ImportError('not the one you wanted')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])
    with TaskExecutor(echo_output=False) as running:
        assert running.submit(programs.echo, 1).result(20) == 1


def test_a_preload_that_exits_is_only_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "exiting_module.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with TaskExecutor(preload=["exiting_module"], echo_output=False) as running:
        assert running.submit(programs.echo, 1).result(20) == 1
    assert "cannot preload exiting_module: SystemExit: 3" in caplog.text


def test_a_fork_of_the_program_does_not_keep_the_template(tmp_path):
    with TaskExecutor(echo_output=False) as running:
        running.submit(programs.echo, 1).result(20)
        pid = os.fork()
        if pid == 0:
            signal.pause()
            os._exit(0)
        started = time.monotonic()
        running.shutdown()
        assert time.monotonic() - started < 2
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_an_executor_works_inside_a_task_and_ends_with_it(tmp_path):
    with TaskExecutor(echo_output=False, sandbox="none", limits=Limits(abort_grace=0.3)) as outer:
        assert outer.submit(programs.executor_inside, None).result(30) == 3
        task = outer.submit(programs.executor_inside, str(tmp_path / "pids"))
        wait_until((tmp_path / "pids").exists, seconds=20)
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert len(pids) == 3
        task.abort()
        task.report(20)
        wait_until(lambda: all(gone(pid) for pid in pids), seconds=3)


def test_an_executor_inside_a_sandboxed_task_says_that_it_cannot_work(executor):
    report = executor.submit(programs.executor_inside, None).report(30)
    assert report.error_type == "LauncherError"
    assert "no task can run here" in report.message


# --- The executor ----------------------------------------------------------------------------------------------------


def test_tasks_run_at_once_and_each_has_its_own_report(executor):
    tasks = [executor.submit(program) for program in (programs.raise_error, programs.segfault, programs.exit_zero)]
    tasks.append(executor.submit(programs.echo, 5))
    reports = [task.report(20) for task in tasks]
    assert [report.reason for report in reports] == [
        EndReason.FAILED,
        EndReason.CRASHED,
        EndReason.CRASHED,
        EndReason.COMPLETED,
    ]
    assert len({report.task_id for report in reports}) == 4


def test_the_result_can_be_waited_for_with_a_timeout(executor):
    task = executor.submit(programs.stop_when_asked)
    with pytest.raises(TimeoutError):
        task.result(0.05)
    assert not task.done()
    ready(task)
    task.abort()
    assert task.report(20).stopped_by is StopStage.ABORT


def test_a_waiting_task_that_is_aborted_never_starts(executor):
    with TaskExecutor(max_concurrent_tasks=1, echo_output=False) as narrow:
        first = narrow.submit(programs.stop_when_asked)
        ready(first)
        second = narrow.submit(programs.echo, 1)
        second.abort()
        report = second.report(20)
        assert report.reason is EndReason.INTERRUPTED_BY_CLIENT
        assert report.message == "Aborted by client; it was never started"
        assert report.exit_code is report.signal is None
        third = narrow.submit(programs.echo, 3)
        first.abort()
        assert third.result(20) == 3


def test_leaving_after_an_exception_aborts_what_runs():
    def leave_in_anger():
        with TaskExecutor(echo_output=False, limits=Limits(abort_grace=0.2)) as running:
            tasks.append(running.submit(programs.sleep_in_c))
            raise KeyError

    tasks = []
    with pytest.raises(KeyError):
        leave_in_anger()
    assert tasks[0].report(1).reason is EndReason.INTERRUPTED_BY_CLIENT


def test_a_template_that_dies_is_replaced():
    with TaskExecutor(echo_output=False) as running:
        parent = running.submit(programs.describe_process).result(20)["parent"]
        victim = running.submit(programs.stop_when_asked)
        ready(victim)
        os.kill(parent, signal.SIGKILL)
        report = victim.report(20)
        assert report.reason is EndReason.CRASHED
        assert report.message == "the template process died of SIGKILL"
        assert running.submit(programs.describe_process).result(20)["parent"] != parent


def test_signals_to_the_template_are_not_its_to_decide():
    with TaskExecutor(echo_output=False) as running:
        about = running.submit(programs.describe_process).result(20)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(about["parent"], number)
        assert os.getsid(about["parent"]) != os.getsid(0)
        again = running.submit(programs.describe_process).result(20)
        assert again["parent"] == about["parent"]
        assert again["sigterm"]


def test_a_callback_whose_module_crashes_the_template_is_reported(tmp_path, monkeypatch):
    (tmp_path / "crashing_module.py").write_text("import ctypes\nctypes.string_at(0)\n\ndef train():\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with TaskExecutor(echo_output=False) as running:
        task = running.submit(_ByName("crashing_module", "train"))
        report = task.report(20)
        assert report.reason is EndReason.REFUSED
        assert report.message == "the template process died of SIGSEGV"
        assert running.submit(programs.echo, 1).result(20) == 1


def test_a_callback_whose_module_cannot_be_imported_says_so():
    with TaskExecutor(echo_output=False) as running, pytest.raises(TaskFailed) as caught:
        running.submit(_ByName("module_that_is_not_there", "train")).result(20)
    assert "the callback cannot be loaded in a task process: ModuleNotFoundError" in str(caught.value)


def test_a_callback_whose_module_hangs_can_be_aborted(tmp_path, monkeypatch):
    (tmp_path / "hanging_module.py").write_text("import time\ntime.sleep(1000)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with TaskExecutor(echo_output=False, limits=Limits(abort_grace=0.2)) as running:
        task = running.submit(_ByName("hanging_module", "train"))
        task.abort()
        report = task.report(20)
        assert report.reason is EndReason.INTERRUPTED_BY_CLIENT
        assert report.message == "Aborted by client; it was never started"
        assert running.submit(programs.echo, 1).result(20) == 1


def test_threads_in_the_template_make_it_spawn(caplog, tmp_path, monkeypatch):
    (tmp_path / "threaded_module.py").write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n"
        "def train():\n    return 'trained'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with TaskExecutor(echo_output=False) as running:
        task = running.submit(_ByName("threaded_module", "train"))
        assert task.result(20) == "trained"
        assert task.report().start_method == "spawn"
        assert running.submit(programs.echo, 1).result(20) == 1
    said = [record for record in caplog.records if getattr(record, "action", "") == "template_fallback"]
    assert len(said) == 1


class _ByName:
    """Pickles as a reference to `module.name`, without importing it here."""

    def __init__(self, module, name):
        self.module, self.name = module, name

    def __call__(self):
        raise AssertionError("never called here")

    def __reduce__(self):
        return _find, (self.module, self.name)


def _find(module, name):
    import importlib

    return getattr(importlib.import_module(module), name)
