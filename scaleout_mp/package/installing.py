"""Programs that make environments and install into them: uv where there is one, else venv and pip."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Final

from scaleout_mp.errors import PackageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

#: Lines of the end of what a program said that go into an error.
_LAST_LINES: Final = 12
#: Seconds between two looks at whether the build was broken off.
LOOK_EVERY: Final = 0.2
#: A line of requirements that is an option and the file that it names.
_NAMES_FILE: Final = re.compile(r"(-r|--requirement|-c|--constraint)(?:\s+|=)\s*(\S.*)")


class Installer:
    """Runs programs for one environment."""

    name = ""

    def __init__(self, path: str, beside: str, require_wanted: Callable[[], None], *, lock: int | None = None) -> None:
        """The environment lies at `path`; programs run in the folder `beside`.

        `require_wanted` raises PackageError when the work is to be broken off. Programs inherit the descriptor `lock`:
        when this one is killed, whoever waits for the lock must wait for them as well.
        """
        self._path = path
        self._beside = beside
        self._require_wanted = require_wanted
        self._inherited = () if lock is None else (lock,)

    @property
    def python(self) -> str:
        """The environment's interpreter."""
        return os.path.join(self._path, "bin", "python")

    def make(self) -> None:
        """Make an empty environment. Raises PackageError."""
        raise NotImplementedError

    def install(self, requirements: Sequence[str]) -> None:
        """Install what the lines of a requirements file say. Raises PackageError."""
        with tempfile.NamedTemporaryFile("w", suffix=".txt", prefix="requirements-") as file:
            file.write("".join(f"{self._from_here(line)}\n" for line in requirements))
            file.flush()
            self._install_file(file.name)

    def _from_here(self, line: str) -> str:
        """Return a line that names another file so that it is found: it would be looked for beside ours."""
        named = _NAMES_FILE.match(line)
        return line if named is None else f"{named[1]} {os.path.join(self._beside, named[2])}"

    def _install_file(self, path: str) -> None:
        raise NotImplementedError

    def run(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Run a program to its end. Raises PackageError with its last lines."""
        # PYTHONPATH and the like would have the environment find the program's modules.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = subprocess.Popen(
                command,
                cwd=self._beside,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**inherited, **(environment or {})},
                start_new_session=True,
                pass_fds=self._inherited,
            )
            try:
                code = self._wait(process)
            finally:
                # What it started ends with it.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if code != 0:
                output.seek(0)
                said = "\n".join(output.read().splitlines()[-_LAST_LINES:])
                raise PackageError(f"{os.path.basename(command[0])} ended with exit code {code}:\n{said}")

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        while True:
            self._require_wanted()
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(LOOK_EVERY)


class _Uv(Installer):
    name = "uv"

    def __init__(
        self, path: str, beside: str, require_wanted: Callable[[], None], *, lock: int | None = None, program: str
    ) -> None:
        super().__init__(path, beside, require_wanted, lock=lock)
        self._program = program

    def make(self) -> None:
        self.run([self._program, "venv", "--python", sys.executable, self._path])

    def _install_file(self, path: str) -> None:
        self.run([self._program, "pip", "install", "--python", self.python, "-r", path])


class _Pip(Installer):
    name = "venv and pip"

    def make(self) -> None:
        self.run([sys.executable, "-m", "venv", self._path])

    def _install_file(self, path: str) -> None:
        pip = [self.python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "-r", path]
        self.run(pip)


def find_installer(path: str, beside: str, require_wanted: Callable[[], None], *, lock: int) -> Installer:
    """Return what is there to make the environment at `path`; the arguments are those of `Installer`."""
    uv = shutil.which("uv")
    if uv is None:
        return _Pip(path, beside, require_wanted, lock=lock)
    return _Uv(path, beside, require_wanted, lock=lock, program=uv)
