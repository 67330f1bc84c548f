"""What is left when the supervisor is killed with -9: nothing."""

from __future__ import annotations

import contextlib
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
    if not alive(pid):
        # A zombie has none, and its folder is closed to ordinary users.
        return set()
    held = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        # The process is at work, and may close it meanwhile.
        with contextlib.suppress(FileNotFoundError):
            held.add(os.readlink(f"/proc/{pid}/fd/{name}"))
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


BUSY = """
import sys, threading
import programs
from scaleout_mp import TaskExecutor

folder, method = sys.argv[1:]
executor = TaskExecutor(start_method=method, max_concurrent_tasks=20, echo_output=False)
families = [executor.submit(programs.hang_with_family, f"{folder}/{number}") for number in range(6)]
for task in families:
    next(task.records())
print("ready", flush=True)
while True:
    executor.submit(programs.echo, 1)
    executor.submit(programs.exit_zero).report()
"""

IMPORTING = """
import sys, time
import programs
from scaleout_mp import TaskExecutor

folder, method = sys.argv[1:]
sys.path.append(folder)
with open(f"{folder}/hanging_module.py", "w") as file:
    file.write(
        "import os, subprocess, time\\n"
        "child = subprocess.Popen(['sleep', '1000'])\\n"
        f"open('{folder}/import', 'w').write(f'{{child.pid}} {{os.getpid()}}')\\n"
        "time.sleep(1000)\\n"
        "def train(): pass\\n"
    )

class ByName:
    def __call__(self): pass
    def __reduce__(self): return getattr, (Module(), "train")

class Module:
    def __reduce__(self): return __import__, ("hanging_module",)

executor = TaskExecutor(start_method=method, echo_output=False)
family = executor.submit(programs.hang_with_family, f"{folder}/0")
next(family.records())
executor.submit(ByName())
print("ready", flush=True)
time.sleep(1000)
"""


@contextlib.contextmanager
def killed_supervisor(script, *arguments):
    """Run a script until it says that it is ready; it is killed with -9 at the end of the block."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", script, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as supervisor:
        try:
            assert supervisor.stdout.readline() == b"ready\n"
            yield supervisor
        finally:
            supervisor.kill()


@pytest.mark.parametrize("moment", [0.0, 0.013, 0.05, 0.11, 0.2])
def test_nothing_is_left_while_tasks_come_and_go(tmp_path, moment):
    with killed_supervisor(BUSY, str(tmp_path), "template") as supervisor:
        # The moment of the kill within the coming and going is what varies.
        time.sleep(moment)
        everyone = {child.pid for child in psutil.Process(supervisor.pid).children(recursive=True)}
        everyone |= {int(pid) for number in range(6) for pid in (tmp_path / str(number)).read_text().split()}
    wait_until(lambda: not any(alive(pid) for pid in everyone), seconds=1)


def test_nothing_is_left_while_the_template_imports(tmp_path):
    with killed_supervisor(IMPORTING, str(tmp_path), "template"):
        wait_until((tmp_path / "import").exists, seconds=10)
        wait_until((tmp_path / "import").read_text, seconds=10)
        everyone = [int(pid) for name in ("0", "import") for pid in (tmp_path / name).read_text().split()]
        assert len(everyone) == 5
        assert all(alive(pid) for pid in everyone)
    wait_until(lambda: not any(alive(pid) for pid in everyone), seconds=1)


def test_nothing_is_left_of_a_program_that_has_forked(tmp_path):
    forking = SCRIPT.replace("time.sleep(1000)", "import os\nos.write(1, b'%d\\n' % os.fork())\ntime.sleep(1000)")
    with killed_supervisor(forking, str(tmp_path), "template") as supervisor:
        fork = max(int(supervisor.stdout.readline()), int(supervisor.stdout.readline()))
        family = [int(pid) for pid in (tmp_path / "0").read_text().split()]
    try:
        # It holds copies of all that the program had open.
        wait_until(lambda: not any(alive(pid) for pid in family), seconds=1)
        assert alive(fork)
    finally:
        os.kill(fork, signal.SIGKILL)
