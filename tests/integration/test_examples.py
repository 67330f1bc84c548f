"""The examples, run as their readers run them."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from programs_at_work import Program

EXAMPLES = Path(__file__).parents[2] / "examples"
DIGITS = EXAMPLES / "numpy_digits"


def test_executor_only():
    with Program(EXAMPLES / "executor_only.py") as program:
        assert program.end(seconds=60) == 0
        assert "learned y = 3.00 x + 2.00" in program.output
        assert "TaskCrashed: task crash: crashed with SIGSEGV" in program.output
        assert "TaskKilled: task devour: passed its memory limit of 256 MiB" in program.output
        program.require_nothing_left(seconds=1)


def test_numpy_digits(tmp_path):
    with Program(DIGITS / "seed.py", tmp_path / "seed.npz") as seed:
        assert seed.end(seconds=20) == 0
    session = ("--seed", tmp_path / "seed.npz", "--rounds", "3", "--min-clients", "2", "--min-updates", "2")
    place = ("--folder", tmp_path / "network", "--api-port", "0", "--combiner-port", "0", "--token", "secret")
    with Program("-m", "scaleout_mp", "localnet", *session, *place) as network:
        address = re.search(r"http://\S+?(?=,)", network.wait_for_line("API at", seconds=20))[0]
        with _client(address, 1) as one, _client(address, 2) as two:
            line = network.wait_for_line("round 3 finished", seconds=60)
            assert float(re.search(r"accuracy ([\d.]+)", line)[1]) > 0.8
            for client in (one, two):
                client.send(signal.SIGTERM)
                assert client.end(seconds=15) == 0
                client.require_nothing_left(seconds=1)
        assert network.end(seconds=10) == 0
        assert "the session's last model is" in network.lines[-1]


def _client(address, shard):
    return Program(
        DIGITS / "client.py",
        *("--api-url", address, "--token", "secret", "--shard", shard, "--of", "2"),
        env={"SCALEOUT_CLIENT_TASK_POLLING_INTERVAL": "0.3", "no_proxy": "127.0.0.1"},
    )
