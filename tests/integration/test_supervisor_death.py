"""What is left when the supervisor is killed with -9: nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from observing import wait_until

SCRIPT = """
import sys, time
import numpy as np
import programs
from scaleout_mp import Limits, ScaleoutModel, TaskExecutor

folder, method = sys.argv[1:]
executor = TaskExecutor(start_method=method, limits=Limits(memory="1GiB"), echo_output=False)
model = ScaleoutModel.from_training_model([np.zeros(1 << 20)])
tasks = [executor.submit(programs.hang_with_family, f"{folder}/{number}") for number in range(2)]
tasks.append(executor.submit(programs.hold_gil))
tasks.append(executor.submit(programs.allocate, 5))
for task in tasks[:2]:
    next(task.records())
print("ready", flush=True)
time.sleep(1000)
"""


def files_of(pid):
    """Return the files in /dev/shm and in temp folders that a process has open or mapped: what could be left."""
    held = {os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")}
    held |= {line.split(maxsplit=5)[5] for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/" in line}
    return {path for path in held if path.startswith(("/dev/shm/", "/var/tmp/", f"{tempfile.gettempdir()}/"))}


@pytest.mark.parametrize("method", ["template", "spawn"])
def test_nothing_is_left_a_second_after_the_supervisor_was_killed(tmp_path, method):
    own_temp = tmp_path / "temp"
    own_temp.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path), method],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(own_temp)},
    ) as supervisor:
        try:
            assert supervisor.stdout.readline() == b"ready\n"
            family = {int(pid) for name in ("0", "1") for pid in (tmp_path / name).read_text().split()}
            assert len(family) == 6
            everyone = family | {child.pid for child in psutil.Process(supervisor.pid).children(recursive=True)}
            # The template, the two processes without family, and who did not run away.
            assert len(everyone) >= 9
            # Other programs come and go in these folders, so what could be left there is looked at now.
            shared = {path for pid in (supervisor.pid, *everyone) for path in files_of(pid)}
            assert not {path for path in shared if path.startswith("/dev/shm/")}
        finally:
            killed = time.monotonic()
            supervisor.kill()
    wait_until(lambda: not any(alive(pid) for pid in everyone), seconds=1 - (time.monotonic() - killed))
    assert list(own_temp.iterdir()) == []


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_stopped_task_dies_with_its_supervisor(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path), "template"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    ) as supervisor:
        try:
            assert supervisor.stdout.readline() == b"ready\n"
            pids = [int(pid) for pid in (tmp_path / "0").read_text().split()]
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
        finally:
            supervisor.kill()
    wait_until(lambda: not any(alive(pid) for pid in pids), seconds=1)
