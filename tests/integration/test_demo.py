"""The demo as people run it: the whole of it once, then what happens when it is disturbed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from observing import wait_until
from programs_at_work import Program, on_a_terminal

from scaleout_mp.control import running_clients
from scaleout_mp.demo.run import CLIENTS

DEMO = ("-m", "scaleout_mp", "demo")


@pytest.mark.timeout(180)
def test_all_comes_out_as_planned(tmp_path):
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, *DEMO, "--json", "--folder", str(tmp_path / "demo")],
        check=False,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 90
    assert "Traceback" not in done.stderr
    summary = json.loads(done.stdout)
    assert summary["passed"] is True
    assert summary["accuracy"] >= 0.90
    assert [score["number"] for score in summary["rounds"]] == list(range(1, 9))
    assert {check["passed"] for check in summary["checks"]} == {True}
    _check_failures(summary["failures"])
    # 80 epochs in each training; a task that died after epoch 20 sent 21 of them, and not one got lost.
    assert summary["metrics_received"] == (8 * 4 - 4) * 80 + 4 * 21
    _check_lines(done.stderr)
    _check_folder(tmp_path / "demo", summary)


def _check_failures(failures):
    assert [(end["round"], end["client"], end["planned"]) for end in failures] == [
        (2, "client-1", "segfault"),
        (3, "client-2", "leak"),
        (5, "client-3", "hang"),
        (6, "client-4", "raise"),
    ]
    segfault, leak, hang, raised = failures
    assert [end["last_step"] for end in failures] == [20] * 4
    assert segfault["explanation"] == "crashed with SIGSEGV"
    assert segfault["report"]["signal"] == "SIGSEGV"
    assert "in string_at" in segfault["report"]["traceback"]
    assert leak["report"]["memory_limit"] == 128 * 2**20
    # Without a memory cgroup, how far past the limit it gets before the kill depends on the machine's load.
    assert 128 * 2**20 <= leak["report"]["peak_memory"] < 192 * 2**20
    assert (hang["status"], hang["reason"]) == ("INTERRUPTED", "timed_out_by_server")
    assert "SIGKILL" in hang["explanation"]
    assert raised["report"]["error_type"] == "ValueError"
    assert "in commit" in raised["report"]["traceback"]


def _check_lines(text):
    for wanted in (
        "client-1, round 2: crashed with SIGSEGV",
        "client-3, round 5: Timed out by server; killed with SIGKILL",
        "round 8 of 8 finished: 4 updates",
        "All came out as planned",
    ):
        assert wanted in text
    assert "\x1b" not in text, "no escape codes where there is no terminal"


def _check_folder(folder, summary):
    assert len(list((folder / "network" / "rounds").iterdir())) == 8
    assert (folder / "network" / "models" / f"{summary['model_id']}.scm").exists()
    log = (folder / "clients" / "client-1" / "client.log").read_text()
    assert "Fatal Python error: Segmentation fault" in log
    assert (folder / "token").stat().st_mode & 0o077 == 0


def test_terminal_shows_a_live_table(tmp_path):
    # A folder of its own for the temporary files, so that it can be seen to be empty afterwards.
    code, screen = on_a_terminal([*DEMO, "--rounds", "1", "--no-faults"], TMPDIR=str(tmp_path))
    assert code == 0, screen
    assert "\x1b[1A" in screen, "the table is drawn over and over"
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen)
    assert "Federated digits: round 1 of 1" in text
    for heading in ("client", "task", "state", "step", "loss", "memory / limit", "accuracy"):
        assert heading in text
    assert re.search(r"client-1 +train +running", text)
    assert re.search(r"[1-9]\d* / 128 MiB", text)
    assert "All came out as planned" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_middle(tmp_path, number):
    with Program(*DEMO, env={"TMPDIR": str(tmp_path)}) as demo:
        demo.wait_for_line("client-1, round 2", seconds=60)
        demo.send(number)
        assert demo.end(seconds=8) == 130
        demo.require_nothing_left(seconds=0.5)
        assert "Traceback" not in demo.output
        assert demo.lines[-1] == "stopped"
    assert list(tmp_path.iterdir()) == []


def test_second_ctrl_c_does_not_wait_for_a_hung_task(tmp_path):
    # In three rounds the hang is in the first.
    with Program(*DEMO, "--rounds", "3", env={"TMPDIR": str(tmp_path)}) as demo:
        demo.wait_for_line("client-1, round 1: crashed", seconds=60)
        demo.send(signal.SIGINT)
        demo.wait_for_line("stopping", seconds=5)
        asked = time.monotonic()
        demo.send(signal.SIGINT)
        assert demo.end(seconds=8) == 130
        # The hung task alone would hold its client for the two seconds of its grace.
        assert time.monotonic() - asked < 1.9
        demo.require_nothing_left(seconds=2)


def test_a_lost_client_ends_the_demo_with_one_line(tmp_path):
    with Program(*DEMO, "--folder", tmp_path / "demo") as demo:
        demo.wait_for_line("round 1 of 8 finished", seconds=60)
        client = next(child for child in psutil.Process(demo.pid).children() if "client-2" in " ".join(child.cmdline()))
        client.kill()
        assert demo.end(seconds=10) == 1
        assert demo.lines[-1].startswith("error: client-2 is gone (exit code -9); its log")
        assert "Traceback" not in demo.output
        demo.require_nothing_left(seconds=1)


def test_nothing_outlives_a_killed_demo(tmp_path):
    with Program(*DEMO, env={"TMPDIR": str(tmp_path)}) as demo:
        demo.wait_for_line("round 1 of 8 finished", seconds=60)
        demo.kill()
        demo.require_nothing_left(seconds=3)


def test_two_demos_at_once_do_not_meet_and_top_shows_both(tmp_path, monkeypatch):
    # The sockets of their clients lie there.
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    options = ("--rounds", "1", "--no-faults", "--folder")
    with Program(*DEMO, *options, tmp_path / "one") as one, Program(*DEMO, *options, tmp_path / "two") as two:
        wait_until(lambda: len(running_clients()) == 8, seconds=60)
        with Program("-m", "scaleout_mp", "top", "--interval", "0.1", "--json") as top:
            seen = [json.loads(top.wait_for_line("{", seconds=20)) for _ in range(8)]
            assert sorted(client["name"] for client in seen) == sorted(CLIENTS * 2)
            assert len({client["pid"] for client in seen}) == 8
            assert top.end(seconds=90) == 0
            assert top.lines[-1] == "the clients ended"
        assert (one.end(seconds=60), two.end(seconds=60)) == (0, 0)
