"""Packages in an environment of their own, made without a network."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import wheels
from edge_running import RunningClient
from observing import gone, wait_until

from scaleout_mp import PackageError, ScaleoutModel
from scaleout_mp.localnet import LocalNetworkThread, RunStatus, SessionPlan
from scaleout_mp.localnet.events import TaskReported, UpdateReceived

pytest.importorskip("yaml", reason="PyYAML is not installed: `make install` has it")
from scaleout_mp.package import Environments, LocalPackage
from scaleout_mp.package.environment import PythonEnv, read_python_env

STARTUP = """
    import importlib.util, os, sys
    import onlythere
    from scaleout_mp import ScaleoutModel

    def train(model, settings):
        weights = [array + 1 for array in model.get_training_model()]
        meta = {"training_metadata": {"num_examples": 5}, "prefix": sys.prefix, "version": onlythere.VERSION}
        return ScaleoutModel.from_training_model(weights), meta

    def look(parameters):
        names = ["grpc", "cloudpickle", "psutil", "yaml", "requests", "cryptography"]
        return {
            "found": [name for name in names if importlib.util.find_spec(name)],
            "prefix": sys.prefix, "version": onlythere.VERSION,
        }

    def startup(client):
        client.set_train_callback(train)
        client.set_validate_callback(lambda model: {"ok": 1})
        client.set_custom_callback("look", look)
"""


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheels")
    for name in ("numpy", "msgpack"):
        wheels.repack(name, folder)
    for version in ("1.0", "2.0"):
        wheels.make("onlythere", version, f"VERSION = {version!r}\n", folder)
    return folder


@pytest.fixture(params=["uv", "pip"])
def offline(request, index, monkeypatch):
    """Have the installer find wheels in a folder alone."""
    uv = shutil.which("uv") or shutil.which("uv", path=os.path.dirname(sys.executable))
    if request.param == "uv":
        if uv is None:
            pytest.skip("uv is not installed")
        monkeypatch.setattr("scaleout_mp.package.installing.shutil.which", lambda _: uv)
    else:
        monkeypatch.setattr("scaleout_mp.package.installing.shutil.which", lambda _: None)
    for variable, value in {"NO_INDEX": "1", "FIND_LINKS": str(index), "OFFLINE": "1"}.items():
        monkeypatch.setenv(f"PIP_{variable}", value)
        monkeypatch.setenv(f"UV_{variable}", value)
    monkeypatch.delenv("PIP_OFFLINE")
    return request.param


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "client"
    folder.mkdir()
    (folder / "scaleout.yaml").write_text("python_env: python_env.yaml\nentry_points:\n  startup: startup.py\n")
    want(folder, "1.0")
    (folder / "startup.py").write_text(textwrap.dedent(STARTUP))
    return folder


def want(folder, version):
    text = f"name: mine\nbuild_dependencies: []\ndependencies:\n  - scaleout\n  - onlythere=={version}\n"
    (folder / "python_env.yaml").write_text(text)


def look(net, edge):
    task = edge.issue("Custom_look")
    task.done(100)
    (end,) = net.events.of(TaskReported, lambda event: event.correlation_id == task.correlation_id and event.done)
    assert end.status == "COMPLETED", end.response
    return end.response


@pytest.mark.parametrize("sandbox", ["auto", "strict"])
def test_a_package_runs_in_its_own_environment_with_numpy_and_msgpack_alone(tmp_path, folder, offline, sandbox):
    environments = Environments(tmp_path / "cache")
    package = LocalPackage(folder, environments=environments)
    with (
        LocalNetworkThread(tmp_path / "net") as net,
        RunningClient(net, package=package, callbacks=False, sandbox=sandbox) as edge,
    ):
        first = look(net, edge)
        with ScaleoutModel.from_training_model([np.zeros((3, 3), np.float32)]) as seed:
            result = net.run_session(SessionPlan(rounds=1), seed, timeout=60)
        # Another content is another environment, and another template.
        want(folder, "2.0")
        second = look(net, edge)
    assert result.status is RunStatus.FINISHED
    (update,) = net.events.of(UpdateReceived)
    assert update.meta["version"] == "1.0"
    assert first["found"] == second["found"] == []
    assert (first["version"], second["version"]) == ("1.0", "2.0")
    assert sys.prefix not in {first["prefix"], second["prefix"]}
    assert first["prefix"] != second["prefix"]
    assert first["prefix"].startswith(str(tmp_path / "cache"))
    assert "onlythere" not in sys.modules


def test_an_environment_is_built_once_and_anew_when_it_is_broken(tmp_path, folder, offline):
    wanted = read_python_env(folder / "python_env.yaml")
    assert wanted.dependencies == ("onlythere==1.0",)
    environment = Environments(tmp_path / "cache").get(wanted, beside=str(folder))
    built = os.stat(environment.executable, follow_symlinks=False).st_ctime_ns
    assert Environments(tmp_path / "cache").get(wanted, beside=str(folder)) == environment
    assert os.stat(environment.executable, follow_symlinks=False).st_ctime_ns == built
    (library,) = (tmp_path / "cache").glob("environments/*/lib/python*/site-packages/msgpack")
    shutil.rmtree(library)
    Environments(tmp_path / "cache").get(wanted, beside=str(folder))
    assert library.exists()


def test_what_is_required_by_its_path_counts_by_its_content(tmp_path):
    library = tmp_path / "lib"
    (library / "mine").mkdir(parents=True)
    (library / "mine" / "__init__.py").write_text("VERSION = 1")
    (tmp_path / "more.txt").write_text("numpy")
    (tmp_path / "numpy").mkdir()
    for line in ("./lib", "-e lib", "mine @ file:./lib", "./lib[extra]", "-r more.txt"):
        wanted, changed = PythonEnv(dependencies=(line,)), library / "mine" / "__init__.py"
        if line.startswith("-r"):
            changed = tmp_path / "more.txt"
        before = wanted.key(str(tmp_path))
        (library / "build").mkdir(exist_ok=True)
        (library / "build" / "made").write_text(line)
        assert wanted.key(str(tmp_path)) == before
        changed.write_text(f"# {line}")
        assert wanted.key(str(tmp_path)) != before, line
    # A distribution is none, whatever lies there.
    assert PythonEnv(dependencies=("numpy",)).key(str(tmp_path)) == PythonEnv(dependencies=("numpy",)).key("/")


def test_what_cannot_be_installed_is_named(tmp_path, folder, offline):
    want(folder, "3.0")
    wanted = read_python_env(folder / "python_env.yaml")
    with pytest.raises(PackageError, match=r"onlythere"):
        Environments(tmp_path / "cache").get(wanted, beside=str(folder))
    # A second try is not fooled by what the first one left.
    with pytest.raises(PackageError, match=r"onlythere"):
        Environments(tmp_path / "cache").get(wanted, beside=str(folder))


def test_a_build_is_broken_off(tmp_path, monkeypatch):
    slow = tmp_path / "uv"
    slow.write_text(f"#!/bin/sh\ntouch {tmp_path}/begun\nexec sleep 1000\n")
    slow.chmod(0o755)
    monkeypatch.setattr("scaleout_mp.package.installing.shutil.which", lambda _: str(slow))
    environments = Environments(tmp_path / "cache")
    raised = []

    def build():
        try:
            environments.get(PythonEnv(dependencies=("x",)), beside=str(tmp_path))
        except PackageError as error:
            raised.append(str(error))

    thread = threading.Thread(target=build)
    thread.start()
    while not (tmp_path / "begun").exists():
        assert thread.is_alive()
        thread.join(0.01)
    environments.close()
    thread.join(10)
    assert raised == ["the client ended while the package's environment was made"]


def test_files_that_requirements_name_are_looked_for_from_the_package(tmp_path, monkeypatch):
    program = tmp_path / "uv"
    program.write_text(f'#!/bin/sh\n[ $1 = venv ] || {{ shift 5; cat "$1" > {tmp_path}/seen; }}\n')
    program.chmod(0o755)
    (tmp_path / "client").mkdir()
    monkeypatch.setattr("scaleout_mp.package.installing.shutil.which", lambda _: str(program))
    wanted = PythonEnv(dependencies=("-r more.txt", "--constraint=/etc/limits.txt", "x"))
    with pytest.raises(PackageError, match="no interpreter"):
        Environments(tmp_path / "cache").get(wanted, beside=str(tmp_path / "client"))
    lines = (tmp_path / "seen").read_text().splitlines()
    assert lines[:3] == [f"-r {tmp_path}/client/more.txt", "--constraint /etc/limits.txt", "x"]


BUILDER = """
import sys
from scaleout_mp.package import Environments, environment, installing

installing.shutil.which = lambda _: sys.argv[1]
Environments(sys.argv[2]).get(environment.PythonEnv(dependencies=("x",)), beside=sys.argv[2])
"""


def test_the_next_build_waits_for_what_a_killed_client_was_installing(tmp_path):
    slow = tmp_path / "uv"
    slow.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/part\nmv {tmp_path}/part {tmp_path}/begun\nexec sleep 1000\n")
    slow.chmod(0o755)
    with subprocess.Popen([sys.executable, "-c", BUILDER, str(slow), str(tmp_path / "cache")]) as builder:
        wait_until((tmp_path / "begun").exists, seconds=20)
        installer = int((tmp_path / "begun").read_text())
        try:
            builder.kill()
            builder.wait()
            (path,) = (tmp_path / "cache" / "environments").glob("*.lock")
            with open(path) as lock:
                with pytest.raises(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.kill(installer, signal.SIGKILL)
                wait_until(lambda: gone(installer), seconds=10)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(installer, signal.SIGKILL)
