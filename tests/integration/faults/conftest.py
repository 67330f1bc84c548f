"""Where root runs these tests, an ordinary user runs them as well."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest
from ordinary_user import Installation, open_folder, unused_uid

if TYPE_CHECKING:
    from pathlib import Path

#: Those that privilege could make a difference to.
TESTS = [f"tests/integration/faults/test_{name}.py" for name in ("faults", "overshoot")]
#: In the background of a shell that ends at once: no descendant of the process whose descendants are looked at.
START = '("$@" >output 2>&1; echo $? >code.new; mv code.new code) & echo $! >pid'


class Run:
    """pytest, as another user."""

    def __init__(self, folder: Path, uid: int) -> None:
        """Start it, in a folder that the user can reach."""
        installation = Installation(folder)
        installation.make()
        self._home = folder / "home"
        self._home.mkdir(mode=0o700)
        os.chown(self._home, uid, uid)
        python = [str(installation.python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header"]
        paths = [str(installation.checkout / test) for test in TESTS]
        subprocess.run(
            ["sh", "-c", START, "sh", *python, f"--rootdir={installation.checkout}", *paths],
            user=uid,
            group=uid,
            extra_groups=[],
            start_new_session=True,
            cwd=self._home,
            env=installation.environment(self._home),
            stdin=subprocess.DEVNULL,
            check=True,
        )

    def exit_code(self) -> str:
        """Return its exit code once it has ended, "" before."""
        path = self._home / "code"
        return path.read_text().strip() if path.exists() else ""

    def output(self) -> str:
        """Return what it has printed so far."""
        return (self._home / "output").read_text(errors="replace")

    def end(self) -> None:
        """End it if it has not ended: the session of the shell is its own."""
        if not self.exit_code():
            pid = int((self._home / "pid").read_text())
            with contextlib.suppress(ProcessLookupError):
                os.killpg(os.getpgid(pid), signal.SIGKILL)


@pytest.fixture
def run_of_an_ordinary_user():
    """Start the run."""
    uid = unused_uid()
    folder = open_folder(uid)
    run = None
    try:
        run = Run(folder, uid)
        yield run
    finally:
        if run is not None:
            run.end()
        shutil.rmtree(folder, ignore_errors=True)
