"""What tasks leave in /dev/shm."""

from __future__ import annotations

import os
import time

import pytest
import scratch_programs as programs
from observing import wait_until

from scaleout_mp import EndReason, Limits, TaskExecutor


def alive(pid):
    return os.path.exists(f"/proc/{pid}")


@pytest.fixture(scope="module", params=["template", "spawn"])
def executor(request):
    with TaskExecutor(
        start_method=request.param, sandbox="basic", echo_output=False, limits=Limits(abort_grace=0)
    ) as running:
        yield running


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (programs.share_and_hang, EndReason.INTERRUPTED_BY_CLIENT),
        (programs.share_and_crash, EndReason.CRASHED),
        (programs.share_and_return, EndReason.COMPLETED),
    ],
)
def test_nothing_registered_is_left(executor, program, reason):
    task = executor.submit(program)
    names = next(task.records()).attributes["names"].split()
    assert len(names) == 2
    if reason is EndReason.INTERRUPTED_BY_CLIENT:
        assert all(os.path.exists(name) for name in names)
        task.abort()
    report = task.report(20)
    assert report.reason is reason
    # It was there for that and has left by itself.
    assert not any("had to be killed" in note for note in report.notes)
    assert [name for name in names if os.path.exists(name)] == []


def test_nobody_lives_on_by_the_name_of_a_tracker(executor):
    started = time.monotonic()
    task = executor.submit(programs.pretend_to_be_a_tracker)
    pid = task.result(20)
    assert time.monotonic() - started < 15
    assert not alive(pid)
    assert "1 process that it left behind had to be killed" in task.report().notes


def test_nothing_registered_is_left_by_a_killed_supervisor(tmp_path):
    import subprocess
    import sys

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", programs.SHARING_SUPERVISOR, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as supervisor:
        names = supervisor.stdout.readline().split()
        assert len(names) == 2
        assert all(os.path.exists(name) for name in names)
        supervisor.kill()
    wait_until(lambda: not any(os.path.exists(name) for name in names), what="nothing is left in /dev/shm")
