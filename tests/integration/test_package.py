"""Compute packages against the local network: `startup(client)` in the template, and new versions."""

from __future__ import annotations

import os
import sys
import textwrap

import numpy as np
import pytest
from edge_running import RunningClient
from observing import open_descriptors

from scaleout_mp import Limits, ScaleoutModel
from scaleout_mp.localnet import LocalNetworkThread, RunStatus, SessionPlan
from scaleout_mp.localnet.events import (
    AttributeReceived,
    MetricReceived,
    StatusReceived,
    TaskReported,
    UpdateReceived,
    ValidationReceived,
)

pytest.importorskip("yaml", reason="PyYAML is not installed: `make install` has it")
from scaleout_mp.package import LocalPackage

#: The shape of the published examples: several modules, a class that holds the client, methods as callbacks.
FILES = {
    "scaleout.yaml": """
        entry_points:
          startup: startup.py
    """,
    "startup.py": """
        from training import Trainer

        def startup(client):
            Trainer(client)
    """,
    "training.py": """
        import os
        import sys

        from model import STEP, compile_model
        from scaleout_mp import ScaleoutModel

        class Trainer:
            def __init__(self, client):
                self.client = client
                self.trained = 0
                self.loaded_by = os.getpid()
                self.step = compile_model()
                client.log_attributes({"site": "lund", "version": STEP})
                client.set_train_callback(self.train)
                client.set_validate_callback(self.validate)
                client.set_custom_callback("look", self.look)

            def train(self, model, settings):
                self.trained += 1
                for step in range(settings.get("epochs", 2)):
                    self.client.log_metric({"loss": 1 / (step + 1), "trained": self.trained})
                    self.client.check_task_abort()
                weights = [array + self.step for array in model.get_training_model()]
                meta = {"training_metadata": {"num_examples": 5}, "trained": self.trained, "pid": os.getpid()}
                return ScaleoutModel.from_training_model(weights), meta

            def validate(self, model):
                return {"mean": float(model.get_training_model()[0].mean())}

            def look(self, parameters):
                heavy = sorted({"grpc", "google.protobuf", "yaml", "cloudpickle"} & set(sys.modules))
                names = {"name": self.client.name, "id": self.client.client_id, "path": self.client.package_path}
                return {
                    "heavy": heavy, "names": names, "loaded_by": self.loaded_by, "pid": os.getpid(),
                    "trained": self.trained, "step": self.step,
                }
    """,
    "model.py": """
        STEP = 1

        def compile_model():
            return STEP
    """,
}


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip())


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "client"
    write(folder, FILES)
    return folder


@pytest.fixture
def net(tmp_path):
    with LocalNetworkThread(tmp_path / "net") as network:
        yield network


def running(net, folder, **options):
    return RunningClient(net, package=LocalPackage(folder), callbacks=False, **options)


def outcome(net, edge, task_type, seconds=20, **data):
    task = edge.issue(task_type, **data)
    task.done(seconds)
    (end,) = net.events.of(TaskReported, lambda event: event.correlation_id == task.correlation_id and event.done)
    return end.status, end.response


def seed():
    return ScaleoutModel.from_training_model([np.zeros((3, 3), np.float32)])


@pytest.mark.parametrize(
    ("start_method", "sandbox"), [("template", "auto"), ("spawn", "auto"), ("template", "strict"), ("spawn", "strict")]
)
def test_a_package_trains_in_a_session_and_nothing_of_it_is_in_the_supervisor(net, folder, start_method, sandbox):
    with running(net, folder, start_method=start_method, sandbox=sandbox) as edge:
        with seed() as model:
            result = net.run_session(SessionPlan(rounds=2), model, timeout=60)
        status, seen = outcome(net, edge, "Custom_look")
        opened = [path for path in open_descriptors().values() if path.startswith(str(folder))]

    assert result.status is RunStatus.FINISHED
    assert [round_.metrics["mean"] for round_ in result.rounds] == [1.0, 2.0]
    updates = net.events.of(UpdateReceived)
    # A fresh process for each task: what the object counts begins anew.
    assert [update.meta["trained"] for update in updates] == [1, 1]
    assert len(net.events.of(ValidationReceived)) == 2
    rounds = [update.round_id for update in updates for _ in range(2)]
    assert [(event.step, event.round_id) for event in net.events.of(MetricReceived)] == list(
        zip([0, 1, 0, 1], rounds, strict=True)
    )
    assert status == "COMPLETED", seen
    assert seen["names"] == {"name": "edge", "id": edge.id, "path": str(folder)}
    assert seen["heavy"] == []
    # With the template, all tasks come from the process that loaded the package; it is not this one.
    assert (seen["loaded_by"] == seen["pid"]) is (start_method == "spawn")
    assert seen["loaded_by"] != os.getpid()
    # What `startup` itself logged arrived once, though it may have run for every task.
    # One record for each key: the network speaks release 1.1.
    assert [event.attributes for event in net.events.of(AttributeReceived)] == [{"site": "lund"}, {"version": "1"}]
    # Nothing of the package came into this process.
    assert not {"startup", "training", "model"} & set(sys.modules)
    assert not [name for name, module in sys.modules.items() if str(folder) in str(getattr(module, "__file__", ""))]
    assert str(folder) not in sys.path
    assert opened == []


def test_a_worker_keeps_what_the_package_keeps(net, folder):
    with running(net, folder, isolation="worker") as edge:
        with seed() as model:
            net.run_session(SessionPlan(rounds=2), model, timeout=60)
        _, seen = outcome(net, edge, "Custom_look")
    assert [update.meta["trained"] for update in net.events.of(UpdateReceived)] == [1, 2]
    assert seen["trained"] == 2


@pytest.mark.parametrize("isolation", ["task", "worker"])
def test_a_change_is_picked_up_by_the_next_task(net, folder, isolation):
    with running(net, folder, isolation=isolation) as edge:
        _, before = outcome(net, edge, "Custom_look")
        (folder / "model.py").write_text("STEP = 50\n\ndef compile_model():\n    return STEP\n")
        _, after = outcome(net, edge, "Custom_look")
        _, again = outcome(net, edge, "Custom_look")
    assert (before["step"], after["step"], again["step"]) == (1, 50, 50)
    assert after["loaded_by"] == again["loaded_by"] != before["loaded_by"]
    logged = [event.attributes for event in net.events.of(AttributeReceived)]
    assert [attributes["version"] for attributes in logged if "version" in attributes] == ["1", "50"]


def test_a_task_that_has_the_only_turn_waits_for_the_package(net, folder):
    with running(net, folder, max_concurrent_tasks=1) as edge:
        tasks = [edge.issue("Custom_look") for _ in range(3)]
        for task in tasks:
            task.done(20)
        (folder / "model.py").write_text("STEP = 50\n\ndef compile_model():\n    return STEP\n")
        assert outcome(net, edge, "Custom_look")[1]["step"] == 50


def test_a_task_that_runs_is_not_touched_by_a_change(net, folder, tmp_path):
    go = tmp_path / "go"
    write(
        folder,
        {
            "startup.py": f"""
                import os, time
                VERSION = 1

                def startup(client):
                    def wait(parameters):
                        client.log_attributes({{"waits": "yes"}})
                        while not os.path.exists({str(go)!r}):
                            time.sleep(0.01)
                        return VERSION
                    client.set_custom_callback("wait", wait)
                    client.set_custom_callback("version", lambda parameters: VERSION)
            """
        },
    )
    with running(net, folder) as edge:
        waiting = edge.issue("Custom_wait")
        net.wait_for(lambda event: isinstance(event, AttributeReceived), timeout=20)
        path = folder / "startup.py"
        path.write_text(path.read_text().replace("VERSION = 1", "VERSION = 22"))
        assert outcome(net, edge, "Custom_version") == ("COMPLETED", {"value": 22})
        go.touch()
        waiting.done(20)
        (end,) = net.events.of(TaskReported, lambda e: e.correlation_id == waiting.correlation_id and e.done)
        assert (end.status, end.response) == ("COMPLETED", {"value": 1})


BROKEN = {
    "raises": ("import no_such_module\n", "no_such_module"),
    "syntax": ("def startup(client:\n", "SyntaxError"),
    "crash": ("import ctypes\nctypes.string_at(0)\n", "SIGSEGV"),
    "exit": ("import os\nos._exit(3)\n", "exit code 3"),
    "hang": ("import time\nwhile True: time.sleep(100)\n", "hangs"),
    "no startup": ("x = 1\n", "has no function startup"),
    "no callback": ("def startup(client): pass\n", "registers no callback"),
    "connects": ("def startup(client): client.run()\n", "does not connect"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_package_that_cannot_start_is_told_and_a_better_one_is_taken(net, folder, how, monkeypatch):
    text, told = BROKEN[how]
    monkeypatch.setattr("scaleout_mp.supervisor.package_callbacks.STARTUP_SECONDS", 1.0)
    good = (folder / "startup.py").read_text()
    (folder / "startup.py").write_text(text)
    with running(net, folder) as edge:
        status, response = outcome(net, edge, "Custom_look", 30)
        assert status == "FAILED"
        assert told in response["error"]
        assert str(folder) in response["error"]
        (said,) = net.events.of(StatusReceived, lambda event: event.status_type == "PACKAGE")
        assert told in said.status
        (folder / "startup.py").write_text(good)
        assert outcome(net, edge, "Custom_look")[0] == "COMPLETED"


def test_a_package_that_breaks_later_and_is_mended(net, folder):
    with running(net, folder, limits=Limits(abort_grace=0.5)) as edge:
        assert outcome(net, edge, "Custom_look")[0] == "COMPLETED"
        good = (folder / "scaleout.yaml").read_text()
        (folder / "scaleout.yaml").unlink()
        status, response = outcome(net, edge, "Custom_look")
        assert status == "FAILED"
        assert "no scaleout.yaml" in response["error"]
        (folder / "scaleout.yaml").write_text(good)
        assert outcome(net, edge, "Custom_look")[0] == "COMPLETED"
        assert outcome(net, edge, "Custom_other") == (
            "FAILED",
            {"error": "this client has no custom callback for Custom_other", "reason": "failed"},
        )


def test_a_mended_package_is_noticed_without_a_task(net, folder, monkeypatch):
    monkeypatch.setattr("scaleout_mp.supervisor.package_callbacks.LOOK_EVERY", 0.1)
    good = (folder / "startup.py").read_text()
    (folder / "startup.py").write_text("raise RuntimeError('not yet')\n")
    with running(net, folder):
        net.wait_for(lambda event: isinstance(event, StatusReceived) and "not yet" in event.status, timeout=20)
        (folder / "startup.py").write_text(good)
        net.wait_for(lambda event: isinstance(event, AttributeReceived), timeout=20)
