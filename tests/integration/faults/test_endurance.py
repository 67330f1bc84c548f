"""Many tasks: one after another, and at once."""

from __future__ import annotations

import collections
import gc
import os
import tempfile
import threading
from pathlib import Path

import endurance_programs
import pytest
from fault_stage import MOST_LATE, Ticker
from observing import open_descriptors, wait_until

from scaleout_mp import EndReason, Limits, TaskExecutor

MIB = 1 << 20
#: `make test-all` and `make faults` run ten thousand.
SHORT_TASKS, AT_ONCE = 10_000 if os.environ.get("SCALEOUT_MP_ALL_TESTS") else 2_000, 8
SLEEPERS = 200


def own_memory(pid="self", *fields):
    """Return the sum of some of the fields of smaps_rollup, in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(fields)) * 1024


def standing(executor):
    """Return what must not grow: memory, descriptors, threads, groups, temporary files, children."""
    gc.collect()
    groups = executor._core._groups
    scratch = executor._core._scratch.folders.path
    return {
        "memory": own_memory("self", "Private_"),
        "descriptors": len(open_descriptors()),
        "threads": threading.active_count(),
        "groups": [] if groups is None else [entry.name for entry in os.scandir(groups.base) if entry.is_dir()],
        "scratch": sorted(os.listdir(scratch)),
        "temporary": sorted(os.listdir(tempfile.gettempdir())),
    }


@pytest.fixture
def own_temp(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("own_temp")
def test_ten_thousand_short_tasks():
    def run(first, last):
        waiting = collections.deque()
        for number in range(first, last):
            # With a memory limit, and so with a group where groups can be made, as often as with a file left behind.
            limits = Limits(memory="256MiB") if number % 10 == 5 else None
            waiting.append(executor.submit(endurance_programs.short, number, limits=limits))
            if len(waiting) == AT_ONCE:
                done.append(waiting.popleft().result(60))
        done.extend(task.result(60) for task in waiting)

    done = []
    with TaskExecutor(echo_output=False, max_concurrent_tasks=AT_ONCE) as executor:
        run(0, SHORT_TASKS // 5)
        before = standing(executor)
        run(SHORT_TASKS // 5, SHORT_TASKS)
        after = standing(executor)
    assert done == list(range(SHORT_TASKS))
    assert after.pop("memory") - before.pop("memory") < 4 * MIB
    assert after == before


@pytest.mark.timeout(200)
def test_two_hundred_tasks_that_sleep():
    with TaskExecutor(echo_output=False, max_concurrent_tasks=SLEEPERS + 1, limits=Limits(abort_grace=0)) as executor:
        baseline = executor.submit(endurance_programs.private_memory).result(30)
        before = own_memory("self", "Private_")
        ticker = Ticker(executor._thread.loop, executor._thread.native_id)
        with ticker:
            tasks = [executor.submit(endurance_programs.sleep) for _ in range(SLEEPERS)]
            for task in tasks:
                next(task.records())
            gc.collect()
            each = (own_memory("self", "Private_") - before) / SLEEPERS
            pids = [task._execution._process.tree.pid for task in tasks]
            # What a fork shares with its template is nobody's alone.
            private = [own_memory(pid, "Private_") for pid in pids]
            # All of them, and another one, in the supervisor's rhythm.
            assert executor.submit(endurance_programs.own_pid).result(30) not in pids
        assert ticker.latest < MOST_LATE, f"the loop was {ticker.latest:.3f} s late"
        assert max(private) < 6 * MIB, (max(private), baseline)
        assert each < 100 * 1024, f"{each / 1024:.0f} KiB for each task"
        for task in tasks:
            task.abort()
        assert {task.report(60).reason for task in tasks} == {EndReason.INTERRUPTED_BY_CLIENT}
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), what="the end of all")
