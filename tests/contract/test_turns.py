"""Who runs when, for every start method: slots, the memory budget, GPUs; and what a task has of the machine."""

from __future__ import annotations

import os

import programs
import pytest
import resident_programs as workers
from observing import gone, wait_until

from scaleout_mp import EndReason, Limits, Resources, TaskExecutor, TaskRefused

MIB = 1 << 20


@pytest.fixture(params=["template", "spawn"])
def start(request):
    """Start an executor with some options."""
    executors = []

    def start(**options):
        options.setdefault("limits", Limits(memory="64MiB", abort_grace=1))
        executor = TaskExecutor(start_method=request.param, echo_output=False, **options)
        executors.append(executor)
        executor.submit(programs.echo, 0).result(20)
        return executor

    yield start
    for executor in executors:
        executor.shutdown(abort=True)


def at_work(task):
    next(task.records())
    return task


def test_a_task_waits_while_the_sum_of_limits_would_pass_the_budget(start):
    executor = start(memory_budget="160MiB", max_concurrent_tasks=8)
    first, second = (at_work(executor.submit(workers.stop_when_asked)) for _ in range(2))
    large = executor.submit(workers.stop_when_asked, limits=Limits(memory="100MiB"))
    small = executor.submit(programs.echo, "small", limits=Limits(memory="32MiB"))
    first.abort()
    assert not first.report(20).completed
    assert (large.state, small.state) == ("pending", "pending")
    second.abort()
    at_work(large)
    assert small.result(20) == "small"
    assert large.state == "running"


def test_what_can_never_run_is_refused_at_once(start):
    executor = start(memory_budget="160MiB", gpus=[0])
    blocker = at_work(executor.submit(workers.stop_when_asked))
    for limits, resources, says in (
        (Limits(memory="161MiB"), None, "its memory limit of 161 MiB is over the memory budget of 160 MiB"),
        (Limits(), None, "it has no memory limit"),
        (Limits(memory="64MiB"), Resources(gpus=2), "it wants 2 GPUs, and there are 1"),
    ):
        task = executor.submit(programs.echo, 1, limits=limits, resources=resources)
        with pytest.raises(TaskRefused, match=says):
            task.result(20)
        assert task.report().reason is EndReason.REFUSED
    assert blocker.state == "running"


def test_a_task_that_waits_can_be_aborted_and_holds_up_nobody_then(start):
    executor = start(memory_budget="160MiB")
    first = at_work(executor.submit(workers.stop_when_asked))
    large = executor.submit(programs.echo, 1, limits=Limits(memory="160MiB"))
    small = executor.submit(programs.echo, "small")
    large.abort()
    assert large.report(20).message == "Aborted by client; it was never started"
    assert small.result(20) == "small"
    first.abort()


def test_idle_workers_make_room_the_oldest_first(start):
    executor = start(memory_budget="160MiB", isolation="worker")
    oldest, newest = (executor.submit(workers.pid, worker=name).result(20) for name in "ab")
    # The worker of the fixture's task holds the third part.
    assert executor.submit(programs.echo, 1, worker="c").result(20) == 1
    wait_until(lambda: gone(oldest), seconds=10)
    assert executor.submit(workers.pid, worker="b").result(20) == newest


def test_a_worker_that_is_never_idle_for_too_long_starves_nobody(start):
    executor = start(memory_budget="160MiB")
    kept = executor.worker("kept", idle_time=None)
    own = kept.submit(workers.pid).result(20)
    # It holds what this one lacks, and nobody else will give anything back.
    assert executor.submit(programs.echo, "large", limits=Limits(memory="128MiB")).result(20) == "large"
    assert gone(own)
    assert kept.submit(workers.pid).result(20) != own


def test_gpus_are_shared_out_in_the_childs_environment_only(start):
    before = dict(os.environ)
    executor = start(gpus=[0, "GPU-1"], max_concurrent_tasks=8)
    none = executor.submit(workers.surroundings).result(20)
    assert none["gpus"] == {"CUDA_VISIBLE_DEVICES": "-1", "NVIDIA_VISIBLE_DEVICES": "void"}
    one = Resources(gpus=1)
    first = at_work(executor.submit(workers.stop_when_asked, resources=one))
    second = executor.submit(workers.surroundings, resources=one).result(20)
    assert second["gpus"] == {"CUDA_VISIBLE_DEVICES": "GPU-1", "NVIDIA_VISIBLE_DEVICES": "GPU-1"}
    both = executor.submit(workers.surroundings, resources=Resources(gpus=2))
    assert executor.submit(programs.echo, "no gpu").result(20) == "no gpu"
    assert both.state == "pending"
    first.abort()
    assert sorted(both.result(20)["gpus"]["CUDA_VISIBLE_DEVICES"].split(",")) == ["0", "GPU-1"]
    assert dict(os.environ) == before


def test_a_worker_keeps_its_gpu_while_it_lives(start):
    executor = start(gpus=[3])
    worker = executor.worker("w", resources=Resources(gpus=1))
    own = worker.submit(workers.surroundings).result(20)
    assert own["gpus"]["CUDA_VISIBLE_DEVICES"] == "3"
    # Somebody else wants it: the worker, which has nothing to do, makes room.
    other = executor.submit(workers.surroundings, resources=Resources(gpus=1)).result(20)
    assert other["gpus"]["CUDA_VISIBLE_DEVICES"] == "3"
    assert gone(own["pid"])
    assert worker.submit(workers.surroundings).result(20)["pid"] != own["pid"]


def test_without_gpus_to_share_out_the_environment_is_left_alone(start):
    shown = start().submit(workers.surroundings).result(20)["gpus"]
    assert shown["CUDA_VISIBLE_DEVICES"] == os.environ.get("CUDA_VISIBLE_DEVICES")


def test_nice_affinity_and_threads_of_each_task(start):
    executor = start(resources=Resources(nice=1))
    own = os.getpriority(os.PRIO_PROCESS, 0)
    processor = min(os.sched_getaffinity(0))
    plain = executor.submit(workers.surroundings).result(20)
    assert plain["nice"] == min(19, own + 1)
    assert plain["affinity"] == sorted(os.sched_getaffinity(0))
    pinned = executor.submit(workers.surroundings, resources=Resources(nice=5, affinity=[processor])).result(20)
    assert (pinned["nice"], pinned["affinity"], pinned["threads"]) == (min(19, own + 5), [processor], "1")
    threads = Limits(memory="64MiB", threads=2)
    task = executor.submit(workers.surroundings, limits=threads, resources=Resources(affinity=[processor]))
    assert task.result(20)["threads"] == "2"


def test_other_resources_want_another_process_of_a_worker(start):
    executor = start()
    first = executor.submit(workers.surroundings, worker="w").result(20)
    second = executor.submit(workers.surroundings, worker="w", resources=Resources(nice=3)).result(20)
    assert first["pid"] != second["pid"]
    assert second["nice"] == min(19, first["nice"] + 3)


def test_tasks_that_wait_come_in_order(start):
    executor = start(max_concurrent_tasks=1)
    blocker = at_work(executor.submit(workers.stop_when_asked))
    order = []
    tasks = [executor.submit(programs.echo, number) for number in range(40)]
    for number, task in enumerate(tasks):
        task._outcome.add_done_callback(lambda _, number=number: order.append(number))
    blocker.abort()
    assert [task.result(60) for task in tasks] == list(range(40))
    assert order == list(range(40))
