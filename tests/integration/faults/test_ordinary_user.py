"""The same faults where nothing can be done by privilege: as a user whom nobody else uses."""

from __future__ import annotations

import os

import pytest
from observing import wait_until


@pytest.mark.skipif(os.getuid() != 0, reason="this run is that of an ordinary user, or no other user can be taken on")
@pytest.mark.timeout(800)
def test_every_fault_as_an_ordinary_user(run_of_an_ordinary_user):
    run = run_of_an_ordinary_user
    code = wait_until(run.exit_code, seconds=780, what="the end of the other user's run")
    output = run.output()
    assert code == "0", output[-20_000:]
    print(output.splitlines()[-1])
