"""`scaleout-mp client start` and the commands that talk to it, as programs."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys

import numpy as np
import pytest
from observing import wait_until
from programs_at_work import on_a_terminal

from scaleout_mp import ScaleoutModel
from scaleout_mp.localnet import LocalNetworkThread, RunStatus, SessionPlan, TokenKind
from scaleout_mp.localnet.events import (
    ClientConnected,
    ClientDisconnected,
    ClientEnrolled,
    MetricReceived,
    TaskReported,
)

pytest.importorskip("yaml", reason="PyYAML is not installed: `make install` has it")

STARTUP = """
import os, time
import numpy as np
from scaleout_mp import ScaleoutModel

def startup(client):
    def train(model, settings):
        client.log_metric({"loss": 0.25}, step=4)
        if settings.get("crash"):
            os.kill(os.getpid(), 11)
        while settings.get("wait"):
            client.check_task_abort()
            time.sleep(0.01)
        weights = [array + 1 for array in model.get_training_model()]
        return ScaleoutModel.from_training_model(weights), {"training_metadata": {"num_examples": 1}}

    client.set_train_callback(train)
    client.set_validate_callback(lambda model: {"ok": 1})
"""


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "client"
    folder.mkdir()
    (folder / "scaleout.yaml").write_text("entry_points:\n  startup: startup.py\n")
    (folder / "startup.py").write_text(STARTUP)
    return tmp_path


@pytest.fixture
def net(tmp_path):
    with LocalNetworkThread(tmp_path / "net") as network:
        yield network


def environment(place, **more):
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SCALEOUT_")}
    folders = {"XDG_RUNTIME_DIR": str(place), "XDG_STATE_HOME": str(place / "state")}
    return {**plain, **folders, "SCALEOUT_CLIENT_TASK_POLLING_INTERVAL": "0.1", **more}


def cli(place, *arguments, **more):
    return subprocess.run(
        [sys.executable, "-m", "scaleout_mp", *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=place,
        env=environment(place, **more),
        timeout=60,
    )


class Client:
    def __init__(self, place, net, *arguments, **more):
        self._output = place / "output"
        with self._output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "scaleout_mp", "client", "start", "--api-url", net.api_url, *arguments],
                cwd=place,
                env=environment(place, **more),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if kind is not None:
            print(self._output.read_text(errors="replace"))


def connected(net):
    return net.wait_for(lambda event: isinstance(event, ClientConnected), timeout=30)


def one_line(done, code=1):
    assert done.returncode == code, done
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.strip()


def test_a_client_is_started_watched_and_stopped(place, net):
    with Client(place, net, "--name", "hospital", "--client-id", "h1", "--memory", "1GiB") as client:
        connected(net)
        with ScaleoutModel.from_training_model([np.zeros(3, np.float32)]) as seed:
            result = net.run_session(SessionPlan(rounds=1), seed, timeout=60)
            model_id = net.add_model(seed)
        assert result.status is RunStatus.FINISHED

        crashing = net.issue("h1", "Scaleout_ModelUpdate", model_id=model_id, data={"client_settings": {"crash": True}})
        assert crashing.done(20).status == "FAILED"
        before = len(net.events.of(MetricReceived))
        waiting = net.issue("h1", "Scaleout_ModelUpdate", model_id=model_id, data={"client_settings": {"wait": 1}})
        net.wait_for(lambda _: len(net.events.of(MetricReceived)) > before, timeout=20)

        seen = json.loads(cli(place, "status", "--json").stdout)
        assert (seen["name"], seen["client_id"], seen["connected"]) == ("hospital", "h1", True)
        (task,) = seen["tasks"]
        assert task["correlation_id"] == waiting.correlation_id
        assert (task["phase"], task["memory_limit"], task["last_metrics"], task["last_step"]) == (
            "running",
            1 << 30,
            {"loss": 0.25},
            4,
        )
        (death,) = seen["deaths"]
        assert (death["task"], death["type"], death["reason"]) == (
            crashing.correlation_id,
            "Scaleout_ModelUpdate",
            "crashed",
        )
        assert "SIGSEGV" in death["message"]
        assert (seen["pending_messages"], seen["dropped_messages"], seen["refused_messages"]) == (0, 0, 0)

        shown = cli(place, "status", "--name", "hospital").stdout
        assert waiting.correlation_id in shown
        assert "1.0 GiB" in shown
        assert "SIGSEGV" in shown
        look_at_top(place, waiting.correlation_id)
        watched = cli(place, "top", "--json", "--count", "2", "--interval", "0.1")
        assert [json.loads(line)["client_id"] for line in watched.stdout.splitlines()] == ["h1", "h1"]

        (path,) = (place / "scaleout-mp").glob("*.sock")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700

        assert "no task" in one_line(cli(place, "abort", "nonsense"))
        assert cli(place, "abort", waiting.correlation_id[:12]).returncode == 0
        assert waiting.done(20).status == "INTERRUPTED"

        # A second client of the same name would not know which one is meant.
        twin = cli(place, "client", "start", "--api-url", net.api_url, "--name", "hospital", "--log-level", "CRITICAL")
        assert "runs already" in one_line(twin)

        stopped = cli(place, "stop")
        assert (stopped.returncode, stopped.stdout) == (0, "the client ended\n")
        assert client.process.wait(10) == 0
    assert not path.exists()
    assert [event.client_id for event in net.events.of(ClientDisconnected) if not event.lost] == ["h1"]
    ends = [event.status for event in net.events.of(TaskReported) if event.done]
    assert ends.count("INTERRUPTED") == 1
    assert "no client runs" in one_line(cli(place, "status"))


def look_at_top(place, correlation_id):
    """See the table, on a terminal, and Ctrl-C."""

    def leave_once_drawn(process, screen):
        wait_until(lambda: "SIGSEGV" in screen(), seconds=20, what="the table")
        process.send_signal(signal.SIGINT)

    command = ["-m", "scaleout_mp", "top", "--interval", "0.2"]
    code, screen = on_a_terminal(command, then=leave_once_drawn, XDG_RUNTIME_DIR=str(place))
    assert code == 0, screen
    # The whole screen, and the one from before comes back.
    assert "\x1b[?1049h" in screen
    assert "\x1b[?1049l" in screen
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen)
    for wanted in ("client hospital (h1)", "connected", "1.0 GiB", "step 4", "loss 0.25", "ModelUpdate", "running"):
        assert wanted in text
    assert correlation_id[:8] in text
    assert re.search(r"crashed: .*SIGSEGV", text)
    without_rich = "import sys; sys.modules['rich'] = None; from scaleout_mp.cli.app import run; run(sys.argv[1:])"
    command = ["-c", without_rich, "top", "--count", "2", "--interval", "0.1"]
    _, screen = on_a_terminal(command, XDG_RUNTIME_DIR=str(place))
    entered, first, second = screen.split("\x1b[H")
    assert entered.startswith("\x1b[?1049h")
    assert "client hospital (h1)" in first
    assert correlation_id in second
    assert second.endswith("\x1b[?1049l")


def test_what_a_killed_client_left_is_in_nobodys_way(place, net):
    with Client(place, net, "--name", "a") as client:
        connected(net)
        wait_until(lambda: list((place / "scaleout-mp").glob("*.sock")), seconds=10)
        client.process.send_signal(signal.SIGKILL)
        client.process.wait()
    assert "no client runs" in one_line(cli(place, "status"))
    with Client(place, net, "--name", "a"):
        wait_until(lambda: cli(place, "status").returncode == 0, seconds=30)
        assert cli(place, "stop", "--name", "a").returncode == 0


def test_options_come_from_flags_variables_file_and_default(place):
    (place / "client.yaml").write_text(
        "discover_host: example.org\ndiscover_port: 8092\nname: from-file\nclient_id: c1\nrefresh_token: secret\n"
        "trainer: true\nmemory: 1GiB\n"
    )
    done = cli(place, "config", "--init", "client.yaml", "--name", "flag", "--json", SCALEOUT_MP_MEMORY="2GiB")
    assert done.returncode == 0, done.stderr
    shown = {name: (entry["value"], entry["source"]) for name, entry in json.loads(done.stdout).items()}
    assert shown["name"] == ("flag", "flag")
    assert shown["memory"] == ("2GiB", "variable")
    assert shown["api_url"] == ("example.org", "file")
    assert shown["api_port"] == (8092, "file")
    assert shown["token"] == ("(set)", "file")
    assert shown["sandbox"] == ("auto", "default")
    assert "secret" not in done.stdout
    plain = cli(place, "config", "-n", "x").stdout
    assert any(line.split() == ["name", "x", "flag"] for line in plain.splitlines())


@pytest.mark.parametrize(
    ("arguments", "told", "code"),
    [
        ([], "--api-url", 1),
        (["--combiner", "localhost"], "--combiner-port", 1),
        (["--api-url", "localhost:1", "--package", "nowhere"], "no folder", 1),
        (["--api-url", "localhost:1", "--package", "empty"], "no scaleout.yaml", 1),
        (["--api-url", "localhost:1", "--package", "pointless"], "names no startup file", 1),
        (["--api-url", "localhost:1", "--package", "dangling"], "not in the package", 1),
        (["--api-url", "localhost:1", "--memory", "lots"], "memory must be", 1),
        (["--init", "nowhere.yaml"], "no file nowhere.yaml", 1),
        (["--init", "wrong.yaml"], "no option 'colour'", 1),
        (["--init", "broken.yaml"], "no YAML", 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_each_mistake_takes_one_line(place, arguments, told, code):
    (place / "empty").mkdir()
    for name, text in {"pointless": "x: 1\n", "dangling": "entry_points: {startup: gone.py}\n"}.items():
        (place / name).mkdir()
        (place / name / "scaleout.yaml").write_text(text)
    (place / "wrong.yaml").write_text("colour: blue\n")
    (place / "broken.yaml").write_text("a: [1\n")
    assert told in one_line(cli(place, "client", "start", *arguments), code)


def test_a_network_that_will_not_have_it_is_one_line(place):
    with LocalNetworkThread(place / "guarded", token="a-token-for-tests") as net:
        done = cli(place, "client", "start", "--api-url", net.api_url, SCALEOUT_MP_TOKEN="nonsense")
        assert "the server refused the refresh token" in one_line(done)
        host, port = net.combiner_address.split(":")
        arguments = ("--combiner", host, "--combiner-port", port, "--log-level", "CRITICAL")
        refused = one_line(cli(place, "client", "start", *arguments, SCALEOUT_MP_TOKEN="nonsense"))
        assert refused.startswith(
            f"error: cannot use the combiner at {net.combiner_address} (TLS on): this token needs"
        )


def test_ctrl_c_while_it_cannot_connect(place):
    command = [sys.executable, "-m", "scaleout_mp", "client", "start", "--api-url", "http://127.0.0.1:9"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=place, env=environment(place)) as process:
        assert "trying again" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert said.splitlines()[-1] == "stopped"


def test_a_wrong_flag_is_told(place):
    done = cli(place, "client", "start", "--sandbox", "no")
    assert done.returncode == 2
    assert "--sandbox" in done.stderr


def test_a_client_is_enrolled_and_starts_with_what_it_got(place):
    with LocalNetworkThread(place / "guarded", token="a-token-for-tests") as net:
        token = net.issue_token(TokenKind.ENROLLMENT)
        given = {"SCALEOUT_MP_TOKEN": token, "SCALEOUT_TOKEN_CACHE_DIR": str(place / "tokens")}
        done = cli(place, "client", "enroll", "-u", net.api_url, "-n", "new", "--json", **given)
        assert done.returncode == 0, done.stderr
        (enrolled,) = net.events.of(ClientEnrolled)
        assert json.loads(done.stdout) == {"client_id": enrolled.client_id, "name": "new"}
        with Client(place, net, "-n", "new", **given):
            assert connected(net).client_id == enrolled.client_id
            assert cli(place, "stop").returncode == 0
        # One enrollment is enough.
        assert len(net.events.of(ClientEnrolled)) == 1
        wrong = cli(place, "client", "enroll", "-u", net.api_url, SCALEOUT_MP_TOKEN="nonsense")
        assert wrong.returncode == 1
        assert "Traceback" not in wrong.stderr
        assert "nonsense" not in wrong.stderr


def test_help_has_examples(place):
    for command in (["client", "start"], ["client", "enroll"], ["status"], ["top"], ["stop"], ["abort"], ["config"]):
        done = cli(place, *command, "--help")
        assert done.returncode == 0
        assert "Examples:" in done.stdout, command
