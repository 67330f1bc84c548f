"""The socket by which `status`, `top`, `stop` and `abort` talk to a client on this machine, as the same user."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import re
import socket
import stat
import struct
import threading
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from scaleout_mp.errors import ConfigError, ControlError

if TYPE_CHECKING:
    from scaleout_mp.supervisor.snapshot import ClientSnapshot

logger = logging.getLogger(__name__)

#: Seconds that either side waits for the other.
_PATIENCE: Final = 5.0
_MAX_REQUEST: Final = 1 << 16
_MAX_ANSWER: Final = 1 << 24
#: Clients of one name that run beside each other.
_TWINS: Final = 1000
_SUFFIX: Final = ".sock"


class Controlled(Protocol):
    """What the socket needs of a runtime. Called on the socket's thread."""

    def snapshot(self) -> ClientSnapshot:
        """Return what is to be seen of the client."""
        ...

    def stop(self) -> None:
        """End it; a second call ends it at once."""
        ...

    def abort_task(self, correlation_id: str) -> bool:
        """Ask one task to end."""
        ...


def control_folder() -> str:
    """Return the folder of the sockets of this user's clients, made if need be. Raises ConfigError."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    path = os.path.join(runtime, "scaleout-mp") if runtime else f"/tmp/scaleout-mp-{os.getuid()}"  # noqa: S108
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    facts = os.lstat(path)
    # In /tmp anybody could have made it first.
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise ConfigError(f"{path} must be a folder of this user that nobody else may enter")
    return path


def _socket_path(name: str) -> str:
    # Names may be of any length and hold any character; addresses of sockets are short.
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:32]
    if plain != name:
        plain += "-" + hashlib.blake2b(name.encode(errors="replace"), digest_size=4).hexdigest()
    return os.path.join(control_folder(), plain + _SUFFIX)


class ControlSocket:
    """Answers on a socket, on a thread of its own. A context manager."""

    def __init__(self, name: str, controlled: Controlled, *, sole: bool = True) -> None:
        """Raise ConfigError when a client of that name runs already, unless it need not be the `sole` one."""
        self._path = ""
        self._controlled = controlled
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        names = [name] if sole else [name, *(f"{name}-{number}" for number in range(2, _TWINS))]
        try:
            bound = any(self._bound(one) for one in names)
        except BaseException:
            self._listener.close()
            raise
        if not bound:
            self._listener.close()
            raise ConfigError(f"a client named {name!r} runs already: stop it, or give this one another --name")
        self._thread = threading.Thread(target=self._serve, name="scaleout-control", daemon=True)

    def _bound(self, name: str) -> bool:
        """Take the address of a name; False when a client that runs has it."""
        path = _socket_path(name)
        if os.path.exists(path):
            if _answers(path):
                return False
            # Of one that was killed.
            os.unlink(path)
        try:
            # The folder is closed to others, so there is no moment in which they could connect.
            self._listener.bind(path)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
        os.chmod(path, 0o600)
        self._listener.listen()
        self._path = path
        return True

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                try:
                    self._answer(connection)
                except Exception as error:  # noqa: BLE001 - whatever somebody sends, the next one is answered
                    logger.debug("a request failed: %s", error, extra={"action": "control_failed"})

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(_PATIENCE)
        pid, user = _peer(connection)
        if user not in {os.getuid(), 0} or _is_below(pid):
            return
        request = json.loads(_read_line(connection, _MAX_REQUEST))
        if not isinstance(request, dict):
            raise TypeError("a request is no object")
        answer = self._do(str(request.get("do")), request)
        connection.sendall(json.dumps(answer, allow_nan=False).encode() + b"\n")

    def _do(self, what: str, request: dict[str, Any]) -> dict[str, Any]:
        if what == "status":
            seen = dataclasses.asdict(self._controlled.snapshot())
            return {"ok": True, "pid": os.getpid(), **_finite(seen)}
        if what == "stop":
            self._controlled.stop()
            return {"ok": True, "pid": os.getpid()}
        if what == "abort":
            task = str(request.get("task"))
            known = [one.correlation_id for one in self._controlled.snapshot().tasks]
            found = [one for one in known if one == task] or [one for one in known if one.startswith(task)]
            if len(found) != 1:
                which = "more than one task begins" if found else "there is no task that begins"
                return {"ok": False, "error": f"{which} with {task!r}"}
            self._controlled.abort_task(found[0])
            return {"ok": True, "task": found[0]}
        return {"ok": False, "error": f"unknown request {what!r}"}


def _finite(value: Any) -> Any:
    """Return a value as JSON can carry it: a metric may be NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Return the pid and the user of the other end; the pid is 0 when it cannot be seen from here."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, user, _ = struct.unpack("3i", credentials)
    return pid, user


def _is_below(pid: int) -> bool:
    """Whether a process is this one's descendant: tasks are, whatever they fork, and must not end their own client."""
    while pid > 1:
        if pid == os.getpid():
            return True
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                # The name of the program may hold anything, parentheses included.
                pid = int(file.read().rpartition(b")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            # Gone, so nobody waits for the answer.
            return True
    return False


def _read_line(connection: socket.socket, most: int) -> bytes:
    data = bytearray()
    while not data.endswith(b"\n"):
        piece = connection.recv(1 << 16)
        if not piece:
            raise ConnectionResetError("the other end hung up")
        data += piece
        if len(data) > most:
            raise ValueError("too long")
    return bytes(data)


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PATIENCE)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        return True


def running_clients() -> list[str]:
    """Return the sockets of this user's clients that answer."""
    folder = control_folder()
    names = sorted(name.removesuffix(_SUFFIX) for name in os.listdir(folder) if name.endswith(_SUFFIX))
    paths = [os.path.join(folder, name + _SUFFIX) for name in names]
    return [path for path in paths if _answers(path)]


def find_clients(name: str | None) -> list[str]:
    """Return the sockets of the clients of that name, or of all. Raises ControlError, in one line, for none."""
    if name is not None:
        path = _socket_path(name)
        if not _answers(path):
            raise ControlError(f"no client named {name!r} runs on this machine as this user")
        return [path]
    running = running_clients()
    if not running:
        raise ControlError("no client runs on this machine as this user; scaleout-mp client start starts one")
    return running


def find_client(name: str | None) -> str:
    """Return the socket of the client of that name, or of the only one. Raises ControlError, in one line."""
    running = find_clients(name)
    if len(running) > 1:
        names = ", ".join(os.path.basename(path).removesuffix(_SUFFIX) for path in running)
        raise ControlError(f"several clients run: {names}; say which one with --name")
    return running[0]


def ask(path: str, what: str, **more: Any) -> dict[str, Any]:
    """Send one request and return the answer. Raises ControlError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_PATIENCE)
        try:
            connection.connect(path)
            connection.sendall(json.dumps({"do": what, **more}).encode() + b"\n")
            answer = json.loads(_read_line(connection, _MAX_ANSWER))
        except (OSError, ValueError) as error:
            raise ControlError(f"the client does not answer: {error}") from error
    if not isinstance(answer, dict) or not answer.get("ok"):
        raise ControlError(str(answer.get("error", "the client refused")) if isinstance(answer, dict) else "nonsense")
    return answer
