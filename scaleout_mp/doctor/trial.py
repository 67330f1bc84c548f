"""What a task finds out about its own confinement. Runs in task processes; it tries, and undoes what succeeded."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

NAMESPACES: Final = ("user", "net", "ipc", "mnt", "pid")
#: Set in the doctor's environment; its name is on no list of what may pass.
PRIVATE_VARIABLE: Final = "SCALEOUT_DOCTOR_PRIVATE"

#: What is tried, and how people call it.
ATTEMPTS: Final = {
    "see_secrets": "see secrets in the client's environment",
    "signal": "signal other processes",
    "memory": "look into the memory of other processes",
    "limits": "change limits of other processes",
    "read": "read other files of the user",
    "write": "write other files of the user",
    "mode": "change modes of other files",
    "tcp": "open connections",
    "unix": "talk to services by their sockets",
    "shared_memory": "see others' shared memory",
}


def examine(targets: dict[str, Any]) -> dict[str, Any]:
    """Return what this task is like, and what it can do to the things that the doctor laid out."""
    bystander, file = targets["pid"], targets["file"]
    attempts: dict[str, Callable[[], object]] = {
        "see_secrets": lambda: os.environ[PRIVATE_VARIABLE],
        "signal": lambda: os.kill(bystander, 0),
        "memory": lambda: _close(os.open(f"/proc/{bystander}/mem", os.O_RDONLY)),
        "limits": lambda: _set_same_limit(bystander),
        "read": lambda: _close(os.open(file, os.O_RDONLY)),
        "write": lambda: _close(os.open(file, os.O_WRONLY)),
        "mode": lambda: os.chmod(file, 0o600),
        "tcp": lambda: _connect(socket.AF_INET, ("127.0.0.1", targets["port"])),
        "unix": lambda: _connect(socket.AF_UNIX, targets["socket"]),
        "shared_memory": lambda: os.stat(targets["shared_memory"]),
    }
    return {
        "can": {name: _works(attempts[name]) for name in ATTEMPTS},
        "status": _status(),
        "namespaces": {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in NAMESPACES},
        "limits": {name: resource.getrlimit(kind)[0] for name, kind in _LIMITS.items()},
        "working_directory": os.getcwd(),
        "temporary_files": os.environ.get("TMPDIR", ""),
    }


_LIMITS: Final = {
    "core": resource.RLIMIT_CORE,
    "open_files": resource.RLIMIT_NOFILE,
    "processes": resource.RLIMIT_NPROC,
}


def _works(action: Callable[[], object]) -> bool:
    try:
        action()
    except (OSError, KeyError, ValueError):
        return False
    return True


def _close(descriptor: int) -> None:
    os.close(descriptor)


def _set_same_limit(pid: int) -> None:
    resource.prlimit(pid, resource.RLIMIT_CORE, resource.prlimit(pid, resource.RLIMIT_CORE))


def _connect(family: int, address: Any) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as client:
        client.settimeout(5)
        client.connect(address)


def _status() -> dict[str, str]:
    wanted = {"NoNewPrivs", "Seccomp", "Seccomp_filters", "CapEff"}
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        fields = dict(line.rstrip("\n").split(":", 1) for line in file)
    found = {name: fields[name].strip() for name in wanted if name in fields}
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", encoding="ascii") as file:
        found["oom_score_adj"] = file.read().strip()
    return found
