"""Asking a process where it is must not hurt it; and one that somebody has stopped holds up nobody."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time

import psutil
import pytest
from observing import is_spare, wait_until

from scaleout_mp import EndReason, Limits, TaskExecutor
from scaleout_mp.executor import spy
from scaleout_mp.task import StopStage


@pytest.fixture(scope="module")
def executor():
    with TaskExecutor(echo_output=False, sandbox="basic") as executor:
        yield executor


def wait_in_python():
    """Wait for what never comes, beside another thread that does."""
    lock = threading.Lock()
    lock.acquire()
    threading.Thread(target=lock.acquire, daemon=True, name="second").start()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    lock.acquire()


def wait_in_c():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # One call, which looks at no signal.
    sum(range(1 << 40))


def test_all_threads_are_named_and_the_task_lives_on(executor):
    limits = Limits(no_progress=0.3, abort_grace=0.6)
    report = executor.submit(wait_in_python, limits=limits).report(30)
    assert report.reason is EndReason.NO_PROGRESS
    assert report.stopped_by is StopStage.SIGKILL
    assert report.stacks.count("most recent call first") == 2
    assert report.stacks.startswith("Current thread")
    assert "in wait_in_python" in report.stacks


def test_a_task_that_is_stuck_in_c_is_asked_when_half_of_its_grace_is_over(executor):
    began = time.monotonic()
    report = executor.submit(wait_in_c, limits=Limits(no_progress=0.3, abort_grace=0.6)).report(30)
    assert report.reason is EndReason.NO_PROGRESS
    assert "in wait_in_c" in report.stacks
    assert time.monotonic() - began > 0.6


def test_a_program_that_knows_no_such_signal_does_not_get_it(executor):
    limits = Limits(no_progress=0.3, abort_grace=0.6)
    report = executor.submit(os.execvp, "sleep", ["sleep", "1000"], limits=limits).report(30)
    assert report.reason is EndReason.NO_PROGRESS
    assert (report.signal, report.stopped_by, report.stacks) == ("SIGTERM", StopStage.SIGTERM, None)


def inside(hold):
    hold.sleep(1_000)


def wait_with_the_interpreter_held():
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    inside(ctypes.PyDLL(None))


@pytest.mark.skipif(spy.program() is None, reason="py-spy is not installed: extra `stacks`")
@pytest.mark.parametrize("level", ["none", "strict"])
def test_a_task_that_answers_no_signal_is_read_from_outside(level):
    limits = Limits(wall_time=0.2, abort_grace=1.6)
    with TaskExecutor(echo_output=False, sandbox=level) as executor:
        report = executor.submit(wait_with_the_interpreter_held, limits=limits).report(30)
    assert report.stopped_by is StopStage.SIGKILL
    assert report.stacks is not None
    assert "inside" in report.stacks
    assert "wait_with_the_interpreter_held" in report.stacks


def test_who_looks_from_outside_does_not_hold_up_the_end(executor, tmp_path, monkeypatch):
    slow = tmp_path / "py-spy"
    slow.write_text("#!/bin/sh\nexec sleep 1000\n")
    slow.chmod(0o755)
    monkeypatch.setattr(spy, "program", lambda: str(slow))
    began = time.monotonic()
    limits = Limits(wall_time=0.1, abort_grace=0.8)
    report = executor.submit(wait_with_the_interpreter_held, limits=limits).report(30)
    assert report.stopped_by is StopStage.SIGKILL
    assert report.stacks is None
    assert report.wall_seconds < 0.1 + 0.8 + 0.3
    assert time.monotonic() - began < 3


def test_a_stopped_spare_does_not_hang_the_next_task(executor):
    executor.submit(os.getpid).result(30)

    def spare():
        (template,) = psutil.Process(executor._core._launcher.pid).children()
        return next(filter(is_spare, template.children()), None)

    stopped = wait_until(spare, what="a spare")
    stopped.suspend()
    wait_until(lambda: stopped.status() == psutil.STATUS_STOPPED, what="its stop")
    assert executor.submit(os.getpid).result(5) != stopped.pid
    wait_until(lambda: not stopped.is_running(), what="its end")
