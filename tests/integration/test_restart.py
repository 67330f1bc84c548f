"""A restart that the server orders: the program in its own place, and one end for each task."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest
from edge_running import RunningClient
from observing import wait_until
from programs_at_work import Program

from scaleout_mp.localnet import LocalNetworkThread
from scaleout_mp.localnet.events import (
    ClientConnected,
    ClientDisconnected,
    PollReceived,
    TaskEnded,
    TaskReported,
    TelemetryReceived,
)
from scaleout_mp.supervisor import restart

SCRIPT = Path(__file__).with_name("restart_script.py")
ENVIRONMENT = {"SCALEOUT_CLIENT_TASK_POLLING_INTERVAL": "0.1", "SCALEOUT_CLIENT_SEND_TELEMETRY": "false"}


@pytest.fixture
def net(tmp_path):
    with LocalNetworkThread(tmp_path / "net") as network:
        yield network


class Restarting:
    """The script at work, and what the network knows of it."""

    def __init__(self, net, state, **environment):
        self.net = net
        self.program = Program(SCRIPT, net.api_url, state, env={**ENVIRONMENT, **environment})

    def __enter__(self):
        self.program.__enter__()
        self.first = self.program.wait_for_line("start 1", seconds=30)
        self.program.wait_for_line("is connected", seconds=30)
        self.id = self.net.events.of(ClientConnected)[0].client_id
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self.program.terminate()
                assert self.program.end(seconds=20) == 0, self.program.output
                self.program.require_nothing_left(seconds=3)
        finally:
            self.program.__exit__()

    def issue(self, task_type, **parameters):
        return self.net.issue(self.id, task_type, data={"parameters": parameters})

    def hold(self, **parameters):
        """Have a task at work."""
        seen = len(self.net.events.of(TelemetryReceived))
        task = self.issue("Custom_hold", **parameters)
        wait_until(lambda: len(self.net.events.of(TelemetryReceived)) > seen, seconds=20, what="the task's beginning")
        return task

    def ends(self, task):
        return self.net.events.of(TaskReported, lambda e: e.correlation_id == task.correlation_id and e.done)

    def restarted(self, number):
        """Wait for that start; return what it says."""
        line = self.program.wait_for_line(f"start {number}", seconds=30)
        self.program.wait_for_line("is connected", seconds=30)
        return line


@contextlib.contextmanager
def manager_at(path):
    """Give what a service manager hears, message by message; the kernel keeps only ten of them for it."""
    heard = []

    def listen(manager):
        while said := manager.recv(4096):
            heard.append(said.decode().splitlines())

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        thread = threading.Thread(target=listen, args=(manager,))
        thread.start()
        try:
            yield heard
        finally:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
                last.sendto(b"", str(path))
            thread.join()


def require_a_watchdog_fed(heard, *, pid, starts):
    """While the loop turns, and given the time of a start in between."""
    states = [lines[0] for lines in heard if lines[0] in {"READY=1", "RELOADING=1", "STOPPING=1"}]
    assert states == ["READY=1", *["RELOADING=1", "READY=1"] * (starts - 1)]
    assert all(f"MAINPID={pid}" in lines and "WATCHDOG_USEC=2000000" in lines for lines in heard if "READY=1" in lines)
    # Nothing comes between the longer patience and the next start that is ready.
    longer = [place for place, lines in enumerate(heard) if lines == ["WATCHDOG=1", "WATCHDOG_USEC=600000000"]]
    assert len(longer) == starts - 1
    assert all({"READY=1", "WATCHDOG=1"} & set(heard[place + 1]) for place in longer)


def told(line):
    return re.fullmatch(r"start \d+ of (\d+) (\[.*\]) with (\[.*\])", line).groups()


def test_a_restart_is_the_same_program_in_the_same_process_and_its_end_is_told_by_the_new_one(net, tmp_path):
    told_manager = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "2000000"}
    with manager_at(tmp_path / "notify") as heard, Restarting(net, tmp_path / "state", **told_manager) as script:
        before = {process.pid for process in script.program.processes()}
        order = script.issue("Scaleout_RestartClient")
        second = script.restarted(2)
        assert order.done(20).response == {"restarted": True}
        assert [(end.status, end.response) for end in script.ends(order)] == [("COMPLETED", {"restarted": True})]
        # Same process, arguments and descriptors; of what the first start had started, nothing is left.
        assert told(second) == told(script.first)
        left = before & {process.pid for process in psutil.process_iter()}
        assert left == {script.program.pid}
        assert script.issue("Custom_name").done(20).response == {"start": "2"}
        # And once more: what is told is not obeyed again.
        assert script.issue("Scaleout_RestartClient").done(30).completed
        assert script.restarted(3)
        assert len({event.client_id for event in net.events.of(ClientConnected)}) == 1
        assert not net.events.of(ClientDisconnected)
        assert "run returned" not in script.program.output
        wait_until(lambda: heard[-1] == ["WATCHDOG=1"], seconds=5, what="a sign of life")
        require_a_watchdog_fed(heard, pid=script.program.pid, starts=3)


def test_it_is_refused_while_another_task_runs_unless_that_may_be_ended(net, tmp_path):
    with Restarting(net, tmp_path / "state") as script:
        held = script.hold()
        refused = script.issue("Scaleout_RestartClient").done(20)
        assert (refused.status, refused.response["reason"]) == ("FAILED", "refused")
        assert "1 other task(s) run" in refused.response["error"]
        wrong = script.issue("Scaleout_RestartClient", force="yes").done(20)
        assert "force must be true or false, not 'yes'" in wrong.response["error"]
        order = script.issue("Scaleout_RestartClient", abort_ongoing_tasks=True)
        script.restarted(2)
        assert order.done(20).completed
        (end,) = script.ends(held)
        assert (end.status, end.response["msg"]) == ("INTERRUPTED", restart.RESTARTING)
        # It heeded the abort.
        assert end.response["report"]["reason"] == "interrupted_by_client"
        assert net.events.of(PollReceived, lambda event: event.skips)
        assert len(script.ends(order)) == 1


def test_force_kills_at_once_and_each_task_has_one_end(net, tmp_path):
    with Restarting(net, tmp_path / "state") as script:
        held = script.hold(stubborn=True)
        begun = time.monotonic()
        order = script.issue("Scaleout_RestartClient", force=True)
        script.restarted(2)
        assert order.done(20).completed
        assert time.monotonic() - begun < 15
        (end,) = script.ends(held)
        assert (end.status, end.response["msg"]) == ("INTERRUPTED", restart.RESTARTING)


def test_a_restart_while_the_server_is_away_tells_all_ends_after_it(net, tmp_path):
    with Restarting(net, tmp_path / "state") as script:
        held = script.hold()
        order = script.issue("Scaleout_RestartClient", abort_ongoing_tasks=True)
        script.program.wait_for_line("ordered a restart", seconds=20)
        net.stop_combiner()
        script.program.wait_for_line("start 2", seconds=30)
        net.restart_combiner()
        assert order.done(30).completed
        assert len(script.ends(order)) == 1
        net.wait_for(lambda e: isinstance(e, TaskEnded) and e.correlation_id == held.correlation_id, timeout=20)
        assert len({(end.status, end.response.get("msg")) for end in script.ends(held)}) == 1


def test_without_a_journal_the_order_is_told_before_it_is_obeyed(net):
    with Restarting(net, ":memory:") as script:
        order = script.issue("Scaleout_RestartClient")
        assert order.done(20).response == {"restarted": True}
        script.restarted(2)
        assert len(script.ends(order)) == 1


def test_a_client_in_a_thread_of_another_program_does_not_restart_it(net):
    with RunningClient(net) as edge:
        refused = edge.issue("Scaleout_RestartClient").done(20)
    assert (refused.status, refused.response["reason"]) == ("FAILED", "refused")
    assert "not called in the main thread" in refused.response["error"]


def test_where_a_restart_makes_sense(monkeypatch):
    assert restart.why_not() == ""
    monkeypatch.setattr("sys.argv", ["gone.py"])
    assert "gone.py any more" in restart.why_not()
    monkeypatch.setattr("sys.argv", ["-"])
    assert "standard input" in restart.why_not()
    monkeypatch.setattr("sys.ps1", "> ", raising=False)
    assert "interactive" in restart.why_not()
