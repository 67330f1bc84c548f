"""What a service manager hears, over a real socket."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from scaleout_mp.supervisor.systemd import ServiceManager


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    name = str(tmp_path / "notify") if request.param == "path" else f"@scaleout-mp-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name.replace("@", "\0", 1) if name.startswith("@") else name)
        sock.settimeout(5)
        yield name, lambda: sock.recv(4096).decode()


def test_the_manager_hears_of_start_state_and_end(manager):
    address, heard = manager
    told = ServiceManager({"NOTIFY_SOCKET": address})
    told.ready()
    assert heard().splitlines()[0] == "READY=1"
    told.status("connected")
    assert heard() == "STATUS=connected"
    told.stopping()
    assert heard().splitlines()[0] == "STOPPING=1"
    told.restarting()
    assert heard().splitlines()[0] == "RELOADING=1"
    assert not told.watches


def test_signs_of_life_come_twice_in_the_watchdogs_time(manager):
    address, heard = manager
    told = ServiceManager({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "20000", "WATCHDOG_PID": str(os.getpid())})
    assert told.watches

    async def scenario():
        life = asyncio.create_task(told.give_signs_of_life())
        loop = asyncio.get_running_loop()
        times = []
        for _ in range(3):
            assert await asyncio.to_thread(heard) == "WATCHDOG=1"
            times.append(loop.time())
        life.cancel()
        return times[2] - times[1]

    assert asyncio.run(scenario()) >= 0.005


@pytest.mark.parametrize(
    "environ",
    [{}, {"WATCHDOG_USEC": "1000000"}, {"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}],
)
def test_nobody_is_told_who_does_not_want_to_be(environ):
    assert not ServiceManager(environ).watches


def test_a_manager_that_is_gone_is_a_warning(tmp_path, caplog):
    ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "none")}).ready()
    assert "cannot be told" in caplog.text


def test_without_a_manager_nothing_is_said(caplog):
    ServiceManager({}).ready()
    assert caplog.text == ""
