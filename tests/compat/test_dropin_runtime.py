"""`scaleout.EdgeClient(runtime=scaleout_mp.GrpcEdgeClientRuntime(...))`, with either published release."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from published import RELEASES, ROOT

from scaleout_mp.localnet import LocalNetworkThread, RunStatus, SessionPlan
from scaleout_mp.localnet.events import (
    AttributeReceived,
    ClientConnected,
    MetricReceived,
    TaskReported,
    TelemetryReceived,
)
from scaleout_mp.model import ScaleoutModel


@pytest.fixture
def search_path(tmp_path):
    """Return the way to this package, and to what it needs that the published ones do not bring: pure Python."""
    folder = tmp_path / "beside"
    folder.mkdir()
    for name in ("cloudpickle", "msgpack"):
        (folder / name).symlink_to(Path(importlib.util.find_spec(name).origin).parent)
    return os.pathsep.join([str(ROOT), str(folder)])


class Running:
    def __init__(self, python, url, isolation, tmp_path, search_path):
        self._output = tmp_path / "output"
        settings = {"SCALEOUT_GRPC_SECURE": "false", "SCALEOUT_CLIENT_TASK_POLLING_INTERVAL": "1"}
        state = {"XDG_STATE_HOME": str(tmp_path / "state"), "PYTHONPATH": search_path}
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [str(python), str(Path(__file__).with_name("dropin_client.py")), url, isolation],
                env={**os.environ, **settings, **state},
                cwd=tmp_path,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self):
        return self

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def __exit__(self, kind, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if kind is not None:
            print(self._output.read_text(errors="replace"))


@pytest.mark.parametrize("isolation", ["task", "worker"])
@pytest.mark.parametrize("python", RELEASES)
def test_a_published_client_gets_isolation_by_one_argument(tmp_path, python, isolation, search_path):
    with (
        LocalNetworkThread(tmp_path / "net") as net,
        ScaleoutModel.from_training_model([np.zeros(3, np.float32)]) as seed,
        Running(python, net.api_url, isolation, tmp_path, search_path) as running,
    ):
        net.wait_for(lambda event: isinstance(event, ClientConnected), timeout=40)
        result = net.run_session(SessionPlan(rounds=2, round_timeout=40), seed, timeout=80)
        model_id = net.add_model(seed)
        ends = []
        for settings in ({"crash": True}, {}):
            task = net.issue("id-dropin", "Scaleout_ModelUpdate", model_id=model_id, data={"client_settings": settings})
            task.done(30)
            (end,) = net.events.of(TaskReported, lambda e, t=task: e.correlation_id == t.correlation_id and e.done)
            ends.append(end)
        task = net.issue("id-dropin", "Scaleout_ModelUpdate", model_id=model_id, data={"client_settings": {"wait": 1}})
        net.wait_for(lambda e: isinstance(e, MetricReceived) and "waits" in e.metrics, timeout=20)
        task.abort()
        stopped = task.done(20)
        code = running.stop()
    assert result.status is RunStatus.FINISHED
    assert [round_.metrics for round_ in result.rounds] == [{"mean": 1.0}, {"mean": 2.0}]
    assert [end.status for end in ends] == ["FAILED", "COMPLETED"]
    assert ends[0].response["reason"] == "crashed"
    steps = [event.step for event in net.events.of(MetricReceived) if "loss" in event.metrics]
    assert steps == [0, 1, 2] * 3
    assert stopped.status == "INTERRUPTED"
    attributes = [event.attributes for event in net.events.of(AttributeReceived)]
    assert attributes == [{"site": "7"}, {"stopped": "yes"}]
    assert {"heat": 40.0} in [event.telemetry for event in net.events.of(TelemetryReceived)]
    assert code == 0
