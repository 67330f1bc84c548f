"""kill -9 of supervisor or template at random moments: nothing is left, and the next start removes what could be.

The moments are drawn anew in each run; the seed is in the name of a failure's message.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_programs
import pytest
from fault_stage import marked
from observing import wait_until

from scaleout_mp import EndReason, Limits, TaskExecutor

SEED = random.SystemRandom().randrange(1 << 32)
#: `make test-all` and `make faults` kill a hundred times.
TEMPLATE_KILLS, SUPERVISOR_KILLS = (60, 40) if os.environ.get("SCALEOUT_MP_ALL_TESTS") else (15, 10)
#: Supervisors that are started at once: most of their time is that of their imports.
AT_ONCE = 4
#: Seconds within which the moments lie: from before the first task until all are in full swing.
LONGEST = 0.3
UNTIL_CLEAN = 1.0

SUPERVISOR = """
import kill_programs
from scaleout_mp import Limits, TaskExecutor

executor = TaskExecutor(echo_output=False, preload=[], max_concurrent_tasks=8, limits=Limits(memory="256MiB"))
with executor:
    # It is in the command or in the environment of every process below.
    print(executor._core._scratch.folders.path, flush=True)
    families = [executor.submit(kill_programs.family, "family") for _ in range(3)]
    while True:
        executor.submit(kill_programs.files).result()
"""


def _start(folder):
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": path}
    return subprocess.Popen([sys.executable, "-c", SUPERVISOR], stdout=subprocess.PIPE, text=True, env=environment)


def _wait_until_gone(mark, since, what):
    deadline = since + UNTIL_CLEAN
    while left := marked(mark):
        assert time.monotonic() < deadline, f"{what} of seed {SEED} left {left}"
        time.sleep(0.005)


@pytest.mark.timeout(200)
def test_supervisors(tmp_path):
    generator = random.Random(SEED)
    pids = set()
    waiting = collections.deque(_start(tmp_path) for _ in range(AT_ONCE))
    try:
        for number in range(SUPERVISOR_KILLS):
            if number + AT_ONCE < SUPERVISOR_KILLS:
                waiting.append(_start(tmp_path))
            with waiting.popleft() as supervisor:
                mark = supervisor.stdout.readline().strip()
                assert mark.startswith(f"{tmp_path}/"), mark
                time.sleep(generator.uniform(0, LONGEST))
                supervisor.kill()
                killed = time.monotonic()
            pids.add(str(supervisor.pid))
            _wait_until_gone(mark, killed, f"supervisor {number}")
    finally:
        for supervisor in waiting:
            supervisor.kill()
            with supervisor:
                pass
    with TaskExecutor(echo_output=False, preload=[], scratch_folder=tmp_path) as executor:
        own = executor._core._scratch.folders.path
        wait_until(lambda: [str(path) for path in tmp_path.iterdir()] == [own], what="no scratch folder of a dead one")
        groups = executor._core._groups
        if groups is not None:
            beside = os.listdir(os.path.dirname(groups.base))
            assert not [name for name in beside if name.startswith("scaleout-mp-") and name.split("-")[2] in pids]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(200)
def test_templates(tmp_path):
    generator = random.Random(SEED)
    limits = Limits(abort_grace=0)
    with TaskExecutor(echo_output=False, preload=[], scratch_folder=tmp_path, limits=limits) as executor:
        assert executor.submit(kill_programs.echo, 0).result(30) == 0
        for number in range(TEMPLATE_KILLS):
            mark = f"kill-{os.getpid()}-{number}"
            tasks = [executor.submit(kill_programs.family, mark) for _ in range(2)]
            tasks += [executor.submit(kill_programs.echo, 1) for _ in range(3)]
            time.sleep(generator.uniform(0, LONGEST / 3))
            guardian = executor._core._launcher.pid
            victims = [guardian, *_children(guardian)]
            with contextlib.suppress(ProcessLookupError):
                os.kill(generator.choice(victims), signal.SIGKILL)
            killed = time.monotonic()
            reports = [task.report(30) for task in tasks]
            assert {report.reason for report in reports[:2]} <= {EndReason.CRASHED, EndReason.REFUSED}, reports
            _wait_until_gone(mark, killed, f"template {number}")
            assert executor.submit(kill_programs.echo, number).result(30) == number
        scratch = executor._core._scratch.folders.path
        wait_until(lambda: os.listdir(scratch) == ["template"], what="no scratch folder of a dead task")
    assert list(tmp_path.iterdir()) == []


def _children(pid):
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []
