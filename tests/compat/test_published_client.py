"""Published clients, in an environment of their own, train in a session of the local network."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from published import NEEDS_PUBLISHED, NEEDS_PUBLISHED_1_1, PYTHON, PYTHON_1_1

from scaleout_mp.localnet import LocalNetworkThread, RunStatus, SessionPlan
from scaleout_mp.localnet.events import (
    AttributeReceived,
    ClientDisconnected,
    HeartbeatReceived,
    MetricReceived,
    ModelDownloaded,
    PollReceived,
    TaskReported,
    TelemetryReceived,
    UpdateReceived,
    ValidationReceived,
    VersionChecked,
)
from scaleout_mp.model import ScaleoutModel

TOKEN = "a-token-for-tests"

pytestmark = NEEDS_PUBLISHED


PUBLISHED_IMPORTS = """from scaleout import EdgeClient
from scaleout.client.edge_client import ConnectToApiResult
from scaleoututil.helpers.helpers import get_helper
from scaleoututil.utils.model import ScaleoutModel
"""
OUR_IMPORTS = """from scaleout_mp import ConnectToApiResult, EdgeClient, ScaleoutModel
from scaleout_mp.model import get_helper
"""


class PublishedClient:
    """A published client as a subprocess; a context manager that ends it by SIGTERM."""

    def __init__(self, net, folder, name, *, examples, token=""):
        self.client_id = f"id-{name}"
        self._folder = folder / name
        self._folder.mkdir()
        self._command = [*self.program(), net.api_url, name, str(examples), token]

    def program(self):
        return [str(PYTHON), str(Path(__file__).with_name("published_client.py"))]

    def __enter__(self):
        settings = {"SCALEOUT_GRPC_SECURE": "false", "SCALEOUT_CLIENT_TASK_POLLING_INTERVAL": "1"}
        with (self._folder / "output").open("wb") as output:
            self.process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                env={**os.environ, **settings, "HOME": str(self._folder)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return self

    def output(self):
        return (self._folder / "output").read_text(errors="replace")

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def __exit__(self, kind, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if kind is not None:
            print(f"--- output of {self.client_id}\n{self.output()}")


class OurClient(PublishedClient):
    """The same script, with nothing changed but its imports."""

    def program(self):
        source = Path(__file__).with_name("published_client.py").read_text()
        assert PUBLISHED_IMPORTS in source
        script = self._folder / "our_client.py"
        script.write_text(source.replace(PUBLISHED_IMPORTS, OUR_IMPORTS))
        return [sys.executable, str(script)]


class PublishedClient11(PublishedClient):
    """The same script, as it is, with release 1.1.0."""

    def program(self):
        return [str(PYTHON_1_1), str(Path(__file__).with_name("published_client.py"))]


KINDS = [PublishedClient, pytest.param(PublishedClient11, marks=NEEDS_PUBLISHED_1_1), OurClient]
VERSIONS = {"1.0.7", "1.1.0"}


@pytest.fixture
def seed():
    arrays = [np.zeros(3, np.float32), np.zeros((2, 2), np.float32)]
    with ScaleoutModel.from_training_model(arrays) as model:
        yield model


@pytest.mark.parametrize(
    ("second", "token"),
    [
        pytest.param(PublishedClient, "", id="two of 1.0.7"),
        pytest.param(PublishedClient11, TOKEN, id="1.0.7 and 1.1.0", marks=NEEDS_PUBLISHED_1_1),
        pytest.param(OurClient, TOKEN, id="1.0.7 and ours"),
    ],
)
def test_published_clients_train_in_a_session(tmp_path, seed, token, second):
    folder = tmp_path / "net"
    with LocalNetworkThread(folder, token=token or None, accepted_versions=VERSIONS) as net:
        a = PublishedClient(net, tmp_path, "a", examples=10, token=token)
        b = second(net, tmp_path, "b", examples=30, token=token)
        with a, b:
            net.wait_for_clients(2, timeout=40)
            plan = SessionPlan(
                rounds=2, min_clients=2, min_updates=2, client_settings={"steps": 3, "rate": 1.0}, round_timeout=40
            )
            result = net.run_session(plan, seed, timeout=80)
            codes = [a.stop(), b.stop()]

        ids = {"id-a", "id-b"}
        assert result.status is RunStatus.FINISHED
        for round_ in result.rounds:
            assert {update.client_id: update.num_examples for update in round_.used_updates} == {
                "id-a": 10,
                "id-b": 30,
            }
            assert {validation.client_id for validation in round_.validations} == ids
            assert round_.metrics == {"weight": 3.0 * round_.number}
        with net.open_model(result.model_id) as model:
            assert all((array == 6.0).all() for array in model.get_training_model())

        for round_ in result.rounds:
            where = {"session_id": result.session_id, "round_id": round_.round_id, "model_id": round_.model_id}
            for client_id in ids:
                metrics = net.events.of(
                    MetricReceived,
                    lambda event, c=client_id, r=round_: (event.client_id, event.round_id) == (c, r.round_id),
                )
                assert [metric.step for metric in metrics] == [0, 1, 2]
                for metric in metrics:
                    assert {key: getattr(metric, key) for key in where} == where
        updates = net.events.of(UpdateReceived)
        assert len(updates) == 4
        assert {update.meta["config"] for update in updates} == {
            json.dumps({"client_settings": dict(plan.client_settings)})
        }
        assert len(net.events.of(ValidationReceived)) == 4
        done = [event.correlation_id for event in net.events.of(TaskReported, lambda event: event.done)]
        assert len(done) == len(set(done)) == 8
        assert len(net.events.of(ModelDownloaded)) == 8
        assert {(event.client_id, event.accepted) for event in net.events.of(VersionChecked)} == {
            (client_id, True) for client_id in ids
        }
        assert {event.client_id for event in net.events.of(AttributeReceived)} == ids
        for client_id in ids:
            # Its one polling thread sleeps 1 s between polls; pings that we took for abuse would cut the connection.
            assert 0.5 < net.events.largest_gap(PollReceived, client_id) < 3
            assert net.events.of(HeartbeatReceived, lambda event, c=client_id: event.client_id == c)
        assert codes == [0, 0]
        assert {event.client_id for event in net.events.of(ClientDisconnected) if not event.lost} == ids


def test_a_published_client_with_a_wrong_token_is_turned_away(tmp_path):
    with LocalNetworkThread(tmp_path / "net", token=TOKEN) as net:
        with PublishedClient(net, tmp_path, "a", examples=1, token="wrong") as client:
            assert client.process.wait(40) != 0
        assert net.clients() == ()
        assert "invalid or expired" in client.output()


@pytest.mark.parametrize("kind", KINDS)
def test_published_clients_stage_a_model_and_are_asked(tmp_path, kind):
    with (
        LocalNetworkThread(tmp_path / "net", accepted_versions=VERSIONS) as net,
        ScaleoutModel.from_training_model([np.full(3, 4, np.float32)]) as model,
    ):
        model_id = net.add_model(model)
        with kind(net, tmp_path, "a", examples=1) as client:
            net.wait_for_clients(1, timeout=40)
            staged = net.issue(client.client_id, "Scaleout_StageModel", model_id=model_id).done(20)
            asked = net.issue(
                client.client_id, "Scaleout_Inference", model_id=model_id, data={"parameters": {"times": 3}}
            ).done(20)
            net.wait_for(
                lambda event: isinstance(event, AttributeReceived) and event.attributes == {"answer": "12.0"},
                timeout=10,
            )
            assert client.stop() == 0
        assert (staged.status, asked.status) == ("COMPLETED", "COMPLETED")
        # The published client drops what the callback returns.
        assert asked.response == ({"answer": 12.0} if kind is OurClient else {})
        # Where release 1.0.7 has it, and where 1.1 and we have it.
        folder = ".model_cache" if kind is PublishedClient else ".scaleout/model_cache"
        assert (tmp_path / "a" / folder / f"{model_id}.scm").exists()
        assert len(net.events.of(ModelDownloaded)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_published_clients_run_custom_tasks_until_they_are_aborted(tmp_path, kind):
    with (
        LocalNetworkThread(tmp_path / "net", accepted_versions=VERSIONS) as net,
        kind(net, tmp_path, "a", examples=1) as client,
    ):
        net.wait_for_clients(1, timeout=40)
        echoed = net.issue(client.client_id, "Custom_echo", data={"parameters": {"number": 7}}).done(20)
        assert (echoed.status, echoed.response) == ("COMPLETED", {"number": 7})
        net.wait_for(
            lambda event: isinstance(event, TelemetryReceived) and event.telemetry.get("said") == 7.0, timeout=10
        )
        waiting = net.issue(client.client_id, "Custom_wait", data={"parameters": {}})
        net.wait_for(lambda event: isinstance(event, TaskReported) and event.status == "RUNNING", timeout=20)
        waiting.abort()
        # The published clients take whatever a custom callback raises for its success.
        assert waiting.done(20).status == ("INTERRUPTED" if kind is OurClient else "COMPLETED")
        assert client.stop() == 0
