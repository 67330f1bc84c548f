"""A module whose import tries what a task may not, in the template of level strict: user code runs there as well."""

from __future__ import annotations

import os

from strict_attempts import attempt, read, write

PID = os.getpid()
RESULTS = {}

#: Set for the template alone: the test imports this module as well.
if "TEST_SUPERVISOR" in os.environ:
    _supervisor, _secret = int(os.environ["TEST_SUPERVISOR"]), os.environ["TEST_SECRET"]
    RESULTS = {
        "read a file": attempt(read, _secret),
        "write a file": attempt(write, _secret),
        "signal the supervisor": attempt(os.kill, _supervisor, 0),
        "signal the guardian": attempt(os.kill, os.getppid(), 0),
        "see the supervisor's memory": attempt(os.open, f"/proc/{_supervisor}/mem", os.O_RDONLY),
        "read its environment": attempt(read, f"/proc/{_supervisor}/environ"),
    }


def results():
    return PID, RESULTS
