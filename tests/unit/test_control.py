"""The socket of a client that runs, and what is shown of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import stat

import pytest

from scaleout_mp import TaskExecutor
from scaleout_mp.cli.status_view import lines, tables
from scaleout_mp.control import ControlSocket, ask, find_client, find_clients, running_clients
from scaleout_mp.errors import ConfigError, ControlError
from scaleout_mp.supervisor.snapshot import ClientSnapshot, Death, TaskSnapshot

TASK = TaskSnapshot(
    correlation_id="0123456789abcdef",
    type="Scaleout_ModelUpdate",
    model_id="m",
    round_id="r",
    session_id="s",
    phase="running",
    seconds=12.3,
    process_state="running",
    memory_now=96 << 20,
    memory_limit=128 << 20,
    last_metrics={"loss": float("nan"), "accuracy": 0.5},
    last_step=7,
)
DEATH = Death(task="t", type="Custom_x", reason="crashed", message="crashed with SIGSEGV\x1b[2J[red]", at=0.0)


class Controlled:
    """Stands in for a runtime."""

    def __init__(self, *tasks, name="edge", deaths=()):
        self.stops = 0
        self.aborted = []
        self._seen = ClientSnapshot(
            name=name,
            client_id="c1",
            connected=True,
            pending_messages=3,
            dropped_messages=2,
            tasks=tasks,
            deaths=deaths,
        )

    def snapshot(self):
        return self._seen

    def stop(self):
        self.stops += 1

    def abort_task(self, correlation_id):
        self.aborted.append(correlation_id)
        return True


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "scaleout-mp"


@pytest.fixture
def outside(monkeypatch):
    """Have this process, which serves and asks, count as somebody outside."""
    monkeypatch.setattr("scaleout_mp.control._is_below", lambda _pid: False)


@pytest.mark.usefixtures("outside")
def test_the_whole_status_is_json(folder):
    with ControlSocket("edge", Controlled(TASK, deaths=(DEATH,))):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (path,) = folder.iterdir()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        seen = ask(find_client("edge"), "status")
    assert list(folder.iterdir()) == []
    # JSON has no NaN.
    json.dumps(seen, allow_nan=False)
    assert seen["tasks"][0]["last_metrics"] == {"loss": None, "accuracy": 0.5}
    assert (seen["pid"], seen["connected"], seen["dropped_messages"]) == (os.getpid(), True, 2)
    assert seen["deaths"][0]["reason"] == "crashed"


@pytest.mark.usefixtures("outside")
def test_tasks_are_aborted_by_the_beginning_of_their_id():
    controlled = Controlled(TASK)
    with ControlSocket("edge", controlled):
        path = find_client(None)
        assert ask(path, "abort", task="01234")["task"] == TASK.correlation_id
        for wrong in ("nothing", "234"):
            with pytest.raises(ControlError, match="no task"):
                ask(path, "abort", task=wrong)
        with pytest.raises(ControlError, match="unknown request"):
            ask(path, "dance")
    assert controlled.aborted == [TASK.correlation_id]


@pytest.mark.usefixtures("outside")
def test_names_are_taken_once_unless_they_need_not_be():
    with ControlSocket("edge", Controlled()):
        with pytest.raises(ConfigError, match="runs already"):
            ControlSocket("edge", Controlled())
        with ControlSocket("edge", Controlled(), sole=False), ControlSocket("edge", Controlled(), sole=False):
            assert len(running_clients()) == 3
            with pytest.raises(ControlError, match="several clients run: edge, edge-2, edge-3"):
                find_client(None)
            assert len(find_clients(None)) == 3
            assert find_clients("edge-2") != find_clients("edge")
    with pytest.raises(ControlError, match="no client runs"):
        find_clients(None)


@pytest.mark.usefixtures("outside")
def test_a_dead_clients_address_is_taken_over(folder):
    folder.mkdir(0o700)
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(folder / "edge.sock"))
    dead.close()
    assert running_clients() == []
    with ControlSocket("edge", Controlled()):
        assert ask(find_client("edge"), "status")["client_id"] == "c1"


@pytest.mark.usefixtures("outside")
def test_nonsense_is_no_end_of_it():
    with ControlSocket("edge", Controlled()):
        path = find_client("edge")
        for nonsense in (b"\n", b"[]\n", b"[" * 50_000 + b"\n", b"x" * 70_000 + b"\n", b"\xff\n"):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(path)
                connection.settimeout(10)
                connection.sendall(nonsense)
                # A connection that is closed before all was read is reset.
                with contextlib.suppress(ConnectionResetError):
                    assert connection.recv(100) == b""
        assert ask(path, "status")["ok"] is True


def stop_by(path):
    """Try to stop the client, from a task's own process and from one that has lost its parent."""
    answers = [ask_to_stop(path)]
    ours, theirs = os.pipe()
    if not os.fork():
        if not os.fork():
            os.write(theirs, ask_to_stop(path))
        os._exit(0)
    os.close(theirs)
    os.wait()
    answers.append(os.read(ours, 100))
    return answers


def ask_to_stop(path):
    with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(ConnectionError):
        connection.connect(path)
        connection.sendall(b'{"do": "stop"}\n')
        return connection.recv(100) or b"nothing"
    return b"nothing"


def test_a_task_cannot_end_its_own_client():
    controlled = Controlled()
    with ControlSocket("edge", controlled), TaskExecutor(sandbox="none") as executor:
        assert executor.submit(stop_by, find_client("edge")).result(20) == [b"nothing", b"nothing"]
    assert controlled.stops == 0


def status(*tasks, deaths=()):
    seen = Controlled(*tasks, deaths=deaths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scaleout_mp.control._is_below", lambda _pid: False)
        with ControlSocket("edge", seen):
            return ask(find_client("edge"), "status")


def drawn(seen, width=140):
    from rich.console import Console

    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(tables([seen]))
    return capture.get()


def test_what_is_shown_is_the_same_with_and_without_rich():
    seen = status(TASK, deaths=(DEATH,))
    for text in ("\n".join(lines(seen)), drawn(seen)):
        for wanted in (
            "client edge (c1)",
            "connected, link healthy, 3 messages wait, 2 dropped",
            "ModelUpdate",
            "12 s",
            "step 7",
            "loss nan  accuracy 0.5",
            "96.0 MiB of 128 MiB",
            "crashed: crashed with SIGSEGV",
        ):
            assert wanted in text
        # Neither the terminal nor rich reads what a task wrote.
        assert "\x1b" not in text
        assert "[red]" in text


def test_a_narrow_terminal_is_no_trouble():
    seen = status(TASK, deaths=(DEATH,))
    assert max(map(len, drawn(seen, width=60).splitlines())) <= 60


@pytest.mark.parametrize(("size", "shown"), [(None, r"3\.0 MiB(?! of)"), (4 << 20, r"3\.0 MiB of 4\.0 MiB \(75%\)")])
def test_a_transfer_shows_how_far_it_is(size, shown):
    task = dataclasses.replace(TASK, phase="downloading", moved=3 << 20, to_move=size, last_step=None)
    assert re.search(shown, lines(status(task))[1])


def test_nothing_to_do_is_said():
    assert "no task" in lines(status())[1]
    assert "no task" in drawn(status())
