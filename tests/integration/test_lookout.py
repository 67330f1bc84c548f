"""The watch over memory that is the guardian's: on time when the supervisor is not, and no harm to who stays below."""

from __future__ import annotations

import os
import resource
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from observing import wait_until

from scaleout_mp import EndReason, Limits, TaskExecutor
from scaleout_mp.sandbox import tree
from scaleout_mp.sandbox.cgroup import MemoryGroups
from scaleout_mp.worker import lookout

MIB = 1 << 20


@pytest.fixture(scope="module")
def executor():
    """One without cgroups, whatever the machine has."""

    def refuse():
        raise OSError("no cgroups in this test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryGroups, "find", refuse)
        with TaskExecutor(echo_output=False, preload=["numpy"]) as executor:
            yield executor


def test_a_supervisor_that_is_busy_is_not_needed(executor, tmp_path):
    alive, go = str(tmp_path / "alive"), str(tmp_path / "go")
    os.mkfifo(alive)
    os.mkfifo(go)

    def program():
        """Hold half of what is allowed and, once told to, grow by what passes the limit in a second."""
        held = [np.ones(8 * MIB)]
        # Closed by its end, whatever ends it.
        descriptor = os.open(alive, os.O_WRONLY)
        with open(go, "rb"):
            for _ in range(40):
                time.sleep(0.02)
                held.append(np.ones(MIB // 2))
        time.sleep(1_000)
        os.close(descriptor)

    task = executor.submit(program, limits=Limits(memory="128MiB"))
    with open(alive, "rb") as life:
        wait_until(lambda: task.memory_peak > 60 * MIB, what="a first look")
        blocked = threading.Event()
        executor._thread.loop.call_soon_threadsafe(lambda: blocked.wait(30))
        try:
            with open(go, "wb"):
                assert life.read() == b""
        finally:
            blocked.set()
    report = task.report(30)
    assert report.reason is EndReason.MEMORY_LIMIT
    assert report.signal == "SIGKILL"
    assert 128 * MIB < report.peak_memory < 144 * MIB


def share(count):
    """Fork processes that share 48 MiB, many times over a limit of 96 MiB, and touch nothing of it."""
    held = np.ones(6 * MIB)
    pids = []
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            for _ in range(30):
                time.sleep(0.01)
            os._exit(int(held[0]) - 1)
        pids.append(pid)
    return [os.waitpid(pid, 0)[1] for pid in pids]


def test_measuring_stops_nobody_for_good(executor):
    assert executor.submit(share, 4, limits=Limits(memory="96MiB")).result(30) == [0] * 4


def test_who_had_stopped_itself_stays_so(executor, tmp_path):
    marker = tmp_path / "pid"

    def program():
        held = np.ones(6 * MIB)
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), 19)
            held += 1
            marker.write_text("it ran")
            os._exit(0)
        pids = []
        for _ in range(3):
            pid = os.fork()
            if pid == 0:
                time.sleep(0.3)
                os._exit(0)
            pids.append(pid)
        for pid in pids:
            os.waitpid(pid, 0)
        return not marker.exists()

    assert executor.submit(program, limits=Limits(memory="96MiB")).result(30)


def test_a_peak_is_told_of_a_task_that_stays_below(executor):
    def program():
        held = np.ones(8 * MIB)
        time.sleep(0.3)
        return len(held)

    task = executor.submit(program, limits=Limits(memory="256MiB"))
    assert task.result(30) == 8 * MIB
    assert task.report().peak_memory > 64 * MIB


def test_the_guardian_forgets_who_has_ended(executor):
    executor.submit(time.sleep, 0.05, limits=Limits(memory="256MiB")).result(30)
    guardian = executor._core._launcher.pid

    def idle():
        before = Path(f"/proc/{guardian}/schedstat").read_text()
        time.sleep(0.3)
        return Path(f"/proc/{guardian}/schedstat").read_text() == before

    wait_until(idle, what="a guardian with nothing to look at")


def test_the_guardian_alone_may_run_before_others(executor):
    limit = resource.RLIMIT_RTPRIO
    assert executor.submit(resource.getrlimit, limit).result(30) == (0, 0)
    assert executor.submit(os.sched_getscheduler, 0).result(30) == os.SCHED_OTHER
    may = resource.getrlimit(limit)[0] or os.geteuid() == 0
    wanted = os.SCHED_FIFO if may else os.SCHED_OTHER
    assert os.sched_getscheduler(executor._core._launcher.pid) & ~os.SCHED_RESET_ON_FORK in {wanted, os.SCHED_OTHER}


def test_the_wait_for_a_processor_puts_off_no_look(monkeypatch):
    tag = tree.new_tag()
    watched = lookout._Tree(os.getpid(), tag, 1, 0)
    monkeypatch.setattr(lookout.tree, "wears", lambda pid, worn: (pid, worn) == (os.getpid(), tag))
    monkeypatch.setattr(watched.memory, "look", lambda _: time.sleep(0.2))
    watched.look([], channel=None)
    assert watched.due - time.monotonic() < 0.05
