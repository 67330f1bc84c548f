"""What happens while the kernel lets no descriptors pass: a user's processes have too many under way (unix(7))."""

from __future__ import annotations

import os
import subprocess
import sys

import in_flight
import pytest


@pytest.mark.parametrize(
    "program", ["record_meanwhile", "start_meanwhile", "start_all_the_same", "run_tasks_meanwhile"]
)
def test_frames_wait_until_there_is_room(program):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, in_flight.__file__, program],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
