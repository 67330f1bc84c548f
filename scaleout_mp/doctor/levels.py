"""What a task meets at each level: a task is started there, and tries."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.config import Sandbox
from scaleout_mp.config.sandbox import Level
from scaleout_mp.doctor import trial
from scaleout_mp.errors import ScaleoutError
from scaleout_mp.executor import TaskExecutor

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Seconds for one task, on a machine that has much else to do.
_PATIENCE: Final = 60.0
#: Tasks whose median time is shown.
_TIMED: Final = 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found at one level."""

    level: str
    #: Why no task could be started; None: it could.
    problem: str | None = None
    layers: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    #: What a task can do, by the names of `trial.ATTEMPTS`.
    can: dict[str, bool] = dataclasses.field(default_factory=dict)
    #: Namespaces that are the task's own.
    own_namespaces: tuple[str, ...] = ()
    status: dict[str, str] = dataclasses.field(default_factory=dict)
    limits: dict[str, int] = dataclasses.field(default_factory=dict)
    working_directory: str = ""
    #: Seconds from the order to the result of a task that does next to nothing.
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-serialisable values."""
        return dataclasses.asdict(self)


def examine_levels() -> list[Finding]:
    """Start a task at each level, the weakest first."""
    with _laid_out() as targets:
        return [_examine(level, targets) for level in Level]


def _examine(level: Level, targets: dict[str, Any]) -> Finding:
    try:
        with TaskExecutor(sandbox=Sandbox(level=level.value), echo_output=False) as executor:
            task = executor.submit(trial.examine, targets, name="doctor")
            found = task.result(_PATIENCE)
            seconds = statistics.median(_time_one(executor) for _ in range(_TIMED))
            layers, missing = task.report().layers, executor.missing_layers
    except (ScaleoutError, OSError, TimeoutError) as error:
        return Finding(level=level.value, problem=" ".join(str(error).split()) or type(error).__name__)
    return Finding(
        level=level.value,
        layers=layers,
        missing=missing,
        can=found["can"],
        own_namespaces=tuple(
            kind for kind, name in found["namespaces"].items() if name != os.readlink(f"/proc/self/ns/{kind}")
        ),
        status=found["status"],
        limits=found["limits"],
        working_directory=found["working_directory"],
        seconds=seconds,
    )


def _time_one(executor: TaskExecutor) -> float:
    started = time.perf_counter()
    executor.submit(abs, -1).result(_PATIENCE)
    return time.perf_counter() - started


@contextlib.contextmanager
def _laid_out() -> Iterator[dict[str, Any]]:
    """Have things of the user's for tasks to try their hands on: a process, a file, servers, shared memory."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="scaleout-doctor-"))
        file = os.path.join(folder, "file")
        with open(file, "w", encoding="ascii") as out:
            out.write("private")
        os.chmod(file, 0o600)
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        service = stack.enter_context(socket.socket(socket.AF_UNIX))
        service.bind(os.path.join(folder, "socket"))
        service.listen()
        shared = f"/dev/shm/scaleout-doctor-{secrets.token_hex(8)}"  # noqa: S108
        with contextlib.suppress(OSError):
            os.close(os.open(shared, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            stack.callback(os.remove, shared)
        os.environ[trial.PRIVATE_VARIABLE] = "private"
        stack.callback(os.environ.pop, trial.PRIVATE_VARIABLE, None)
        # It ends when its standard input does, at the latest with this process.
        waiting = [sys.executable, "-c", "input()"]
        bystander = subprocess.Popen(waiting, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
        stack.callback(bystander.wait)
        stack.callback(bystander.kill)
        yield {
            "pid": bystander.pid,
            "file": file,
            "port": server.getsockname()[1],
            "socket": service.getsockname(),
            "shared_memory": shared,
        }
