"""Packages written for the published client run as they are, where that is installed and where it is not."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from edge_running import RunningClient
from published import RELEASES, ROOT

from scaleout_mp import ScaleoutModel
from scaleout_mp.executor import Environment
from scaleout_mp.localnet import LocalNetworkThread, RunStatus, SessionPlan
from scaleout_mp.localnet.events import AttributeReceived, MetricReceived, TaskReported
from scaleout_mp.supervisor.package_callbacks import LoadablePackage

PACKAGE = Path(__file__).with_name("published_package")


class Fixed:
    """A package source that never changes."""

    name = "published"

    def __init__(self, environment):
        self._environment = environment

    def version(self):
        return "1"

    def make_ready(self):
        return LoadablePackage(folder=str(PACKAGE), startup="startup.py", environment=self._environment)

    def close(self):
        pass


@pytest.fixture(params=[pytest.param(None, id="not installed"), *RELEASES])
def environment(request, tmp_path):
    if request.param is None:
        assert importlib.util.find_spec("scaleout") is None
        return None
    # What the environment of the published package lacks, as pure Python.
    root = tmp_path / "root"
    root.mkdir()
    (root / "scaleout_mp").symlink_to(ROOT / "scaleout_mp")
    (root / "msgpack").symlink_to(Path(importlib.util.find_spec("msgpack").origin).parent)
    return Environment(executable=str(request.param), package_root=str(root))


def test_a_published_package_runs_as_it_is(tmp_path, environment):
    with (
        LocalNetworkThread(tmp_path / "net") as net,
        ScaleoutModel.from_training_model([np.zeros(3, np.float32)]) as seed,
        RunningClient(net, package=Fixed(environment), callbacks=False) as edge,
    ):
        result = net.run_session(SessionPlan(rounds=2), seed, timeout=100)
        task = edge.issue("Custom_where")
        task.done(20)
        (end,) = net.events.of(TaskReported, lambda event: event.correlation_id == task.correlation_id and event.done)
        waiting = edge.issue(model_id=net.add_model(seed), settings={"wait": 1})
        net.events.wait_for(
            lambda e: isinstance(e, MetricReceived) and len(net.events.of(MetricReceived)) == 3, timeout=20
        )
        waiting.abort()
        stopped = waiting.done(20)
        with net.open_model(result.model_id) as model:
            assert (model.get_training_model()[0] == 2).all()
    assert result.status is RunStatus.FINISHED
    assert [round_.metrics for round_ in result.rounds] == [{"mean": 1.0}, {"mean": 2.0}]
    assert stopped.status == "INTERRUPTED"
    assert [event.attributes for event in net.events.of(AttributeReceived)] == [{"stopped": "yes"}]
    if environment is None:
        assert end.response == {"file": None, "model": "scaleout_mp.model.scaleout_model"}
    else:
        assert "site-packages/scaleout/__init__.py" in end.response["file"]
        assert end.response["model"] == "scaleoututil.utils.model"
    assert not {"scaleout", "scaleoututil"} & set(sys.modules)


def test_the_names_are_there_only_once_asked_for_and_the_installed_ones_win(tmp_path):
    (tmp_path / "scaleoututil").mkdir()
    (tmp_path / "scaleoututil" / "__init__.py").write_text("HERE = True\n")
    program = """
import sys
try:
    import scaleout
except ModuleNotFoundError:
    pass
else:
    raise AssertionError
from scaleout_mp import compat
compat.install(); compat.install()
from scaleout import EdgeClient
from scaleout.client.edge_client import ConnectToApiResult, EdgeClient as Again, GrpcConnectionOptions
from scaleout.client.logging_context import LoggingContext
from scaleout_mp import EdgeClient as Ours
assert EdgeClient is Again is Ours
try:
    from scaleout import Scaleout
except ImportError as error:
    assert "Scaleout" in str(error), error
else:
    raise AssertionError
import scaleoututil
assert scaleoututil.HERE
try:
    import scaleoututil.utils.model
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("ours must not stand in for a part of theirs")
assert not {"grpc", "yaml", "requests"} & set(sys.modules)
"""
    subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/bin"},
        timeout=60,
    )
