"""The demo's clients as processes: started, watched through their pipes, ended, and looked for afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from typing import TYPE_CHECKING, Final, Self

import psutil

from scaleout_mp.demo import feed
from scaleout_mp.errors import DemoError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from scaleout_mp.demo.faults import PlannedFault

#: In the environment of every process that a fleet started, and of no other; the client passes it on to its tasks.
_MARK: Final = "SCALEOUT_MP_DEMO_RUN"
#: Seconds between two polls of a client: the demo is to be short.
POLLING_INTERVAL: Final = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientSpec:
    """What one client is started with."""

    name: str
    #: Holds data.npz; gets client.log.
    folder: Path
    faults: Sequence[PlannedFault] = ()

    @property
    def data(self) -> Path:
        """The client's own images."""
        return self.folder / "data.npz"

    @property
    def log(self) -> Path:
        """What the client and its tasks print."""
        return self.folder / "client.log"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientExit:
    """How a client's process ended."""

    name: str
    #: Minus the signal's number when one ended it; None: it is still there.
    code: int | None
    #: It did not go when it was told to.
    killed: bool


class ClientProcess:
    """One client that runs, in a session of its own: Ctrl-C in the terminal reaches only the demo."""

    def __init__(self, spec: ClientSpec, command: Sequence[str], environment: dict[str, str]) -> None:
        self.spec = spec
        self._tasks: tuple[feed.TaskView, ...] = ()
        read_end, write_end = os.pipe()
        try:
            with open(spec.log, "wb") as log:
                self._process = subprocess.Popen(
                    [*command, "--feed", str(write_end)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    pass_fds=(write_end,),
                    start_new_session=True,
                )
        except BaseException:
            os.close(read_end)
            raise
        finally:
            # The client's copy must be the only one, so that its end is seen here and ours there.
            os.close(write_end)
        self._reader = threading.Thread(target=self._read, args=(read_end,), name=f"feed-{spec.name}", daemon=True)
        self._reader.start()

    def _read(self, descriptor: int) -> None:
        with open(descriptor, "rb") as pipe:
            for line in pipe:
                self._tasks = feed.decode(line)
        self._tasks = ()

    @property
    def tasks(self) -> tuple[feed.TaskView, ...]:
        """The tasks that the client holds, as it said last."""
        return self._tasks

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def send(self, number: signal.Signals) -> None:
        """Send the process a signal, if it still runs."""
        self._process.send_signal(number)

    def wait(self, seconds: float) -> bool:
        """Wait for the end; return whether it came."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        self._reader.join(1)
        return True

    def last_words(self) -> str:
        """Return the last line of the log."""
        lines = self.spec.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "(its log is empty)"


class Fleet:
    """All clients of one demo. A context manager: no client outlives the block."""

    def __init__(self, specs: Sequence[ClientSpec], *, api_url: str, token_file: Path, memory: str) -> None:
        self._specs = specs
        self._options = ("--api-url", api_url, "--token-file", str(token_file), "--memory", memory)
        self._token_file = token_file
        self._run_id = uuid.uuid4().hex
        self._clients: list[ClientProcess] = []

    def __enter__(self) -> Self:
        environment = _environment(self._run_id, state=self._token_file.with_name("state"))
        try:
            for spec in self._specs:
                self._clients.append(ClientProcess(spec, self._command(spec), environment))
        except BaseException:
            self.stop(patience=0)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(patience=0)

    def _command(self, spec: ClientSpec) -> list[str]:
        command = [sys.executable, "-m", "scaleout_mp.demo.client", *self._options]
        command += ["--name", spec.name, "--data", str(spec.data), "--pass-environment", _MARK]
        for fault in spec.faults:
            command += ["--fault", str(fault)]
        return command

    @property
    def clients(self) -> Sequence[ClientProcess]:
        """Every client that was started, in order."""
        return self._clients

    def require_all(self) -> None:
        """Raise DemoError when a client is gone: it is to survive whatever its tasks do."""
        for client in self._clients:
            if client.exit_code is not None:
                raise DemoError(
                    f"{client.spec.name} is gone (exit code {client.exit_code}); its log, which --folder keeps, ends "
                    f"with: {client.last_words()}"
                )

    def stop(self, *, patience: float, hurry: Callable[[], bool] = lambda: False) -> tuple[ClientExit, ...]:
        """Tell all clients to end, kill those that are there after `patience` seconds or `hurry`; return all ends."""
        deadline = time.monotonic() + patience
        for client in self._clients:
            client.send(signal.SIGTERM)
        ends = []
        for client in self._clients:
            gone = client.wait(0)
            while not gone and time.monotonic() < deadline and not hurry():
                gone = client.wait(min(0.2, max(0.0, deadline - time.monotonic())))
            if not gone:
                # Its template and tasks die with it: they are bound to it by the parent-death signal.
                client.send(signal.SIGKILL)
                client.wait(10)
            ends.append(ClientExit(name=client.spec.name, code=client.exit_code, killed=not gone))
        return tuple(ends)

    def leftovers(self, *, within: float) -> list[str]:
        """Return a line for each process of this fleet, clients and their tasks, that is left after so many seconds."""
        deadline = time.monotonic() + within
        while True:
            left = _marked(self._run_id)
            if not left or time.monotonic() > deadline:
                return [f"process {process.pid}: {_command_of(process)}" for process in left]
            psutil.wait_procs(left, timeout=max(0.0, deadline - time.monotonic()))


def _environment(run_id: str, *, state: Path) -> dict[str, str]:
    """Return the clients' environment: ours without settings meant for other networks, and no proxy to ourselves."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SCALEOUT_")}
    return environment | {
        _MARK: run_id,
        "SCALEOUT_MP_STATE_DIR": str(state),
        "SCALEOUT_CLIENT_TASK_POLLING_INTERVAL": str(POLLING_INTERVAL),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        # Small matrices: threads would only get into each other's way.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def _marked(run_id: str) -> list[psutil.Process]:
    """Return every process with the run's mark, wherever it hangs in the tree of processes."""
    return [process for process in psutil.process_iter() if _is_marked(process, run_id)]


def _is_marked(process: psutil.Process, run_id: str) -> bool:
    # Gone, a zombie, or somebody else's.
    with contextlib.suppress(psutil.Error):
        return process.environ().get(_MARK) == run_id
    return False


def _command_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return "(gone)"
