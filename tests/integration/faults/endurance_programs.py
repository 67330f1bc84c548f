"""What many tasks run: next to nothing."""

from __future__ import annotations

import os
import tempfile
import time

from scaleout_mp import current_task


def short(number):
    """Leave a file behind now and then, log a record, and return."""
    if number % 10 == 0:
        with tempfile.NamedTemporaryFile(delete=False) as file:
            file.write(b"x")
        current_task().log_metric({"x": 1.0}, step=number)
    return number


def sleep():
    current_task().log_metric({"ready": 1.0})
    time.sleep(1_000)


def private_memory():
    """Return the bytes that no other process has."""
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_")) * 1024


def own_pid():
    return os.getpid()
