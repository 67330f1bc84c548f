"""What every test gets: a check that it left no process behind."""

from __future__ import annotations

import time

import pytest
from observing import children


@pytest.fixture(autouse=True)
def state_of_its_own(tmp_path_factory, monkeypatch):
    """Keep what clients keep out of the user's home, and out of other tests."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))


@pytest.fixture(autouse=True)
def no_process_left():
    """Fail a test that leaves a process behind."""
    before = children()
    yield
    deadline = time.monotonic() + 3
    while left := {pid: command for pid, command in children().items() if pid not in before}:
        if time.monotonic() > deadline:
            pytest.fail(f"processes are left: {left}")
        time.sleep(0.01)
