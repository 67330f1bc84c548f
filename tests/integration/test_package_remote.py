"""Packages that the network gives: downloaded, verified, unpacked, replaced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import textwrap

import pytest
from edge_running import RunningClient

from scaleout_mp import PackageError
from scaleout_mp.config import Settings
from scaleout_mp.localnet import LocalNetworkThread
from scaleout_mp.localnet.events import ClientConnected, TaskReported
from scaleout_mp.transport.package_api import PackageApi, RemoteArchive

pytest.importorskip("yaml", reason="PyYAML is not installed: `make install` has it")
from scaleout_mp.package import RemotePackage

TOKEN = "a-token-for-tests"


def pack(tmp_path, name, version):
    folder = tmp_path / f"source-{version}" / "client"
    folder.mkdir(parents=True)
    (folder / "scaleout.yaml").write_text("entry_points:\n  startup: startup.py\n")
    text = f"""
        def startup(client):
            client.set_custom_callback("version", lambda parameters: {{"version": {version}}})
    """
    (folder / "startup.py").write_text(textwrap.dedent(text))
    path = tmp_path / name
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, "client")
    return path


def version(net, client_id):
    task = net.issue(client_id, "Custom_version")
    task.done(30)
    (end,) = net.events.of(TaskReported, lambda event: event.correlation_id == task.correlation_id and event.done)
    return end.response


def test_the_networks_package_runs_and_a_new_one_takes_its_place(tmp_path):
    with LocalNetworkThread(tmp_path / "net") as net:
        net.set_package(pack(tmp_path, "first.tgz", 1))
        api = PackageApi(net.api_url, settings=Settings(), access_token=lambda: None)
        package = RemotePackage(api, archives=tmp_path / "archives", folders=tmp_path / "folders", ask_every=0)
        with RunningClient(net, package=package, callbacks=False) as edge:
            assert version(net, edge.id) == {"version": 1}
            net.set_package(pack(tmp_path, "second.tgz", 2))
            assert version(net, edge.id) == {"version": 2}
            # While there is nothing to be had, what is there goes on.
            net.set_package(None)
            assert version(net, edge.id) == {"version": 2}
        assert len(os.listdir(tmp_path / "archives")) == len(os.listdir(tmp_path / "folders")) == 2


class Lying:
    """An API whose archive is not that of its checksum."""

    def current(self):
        return RemoteArchive(name="a.tgz", checksum="0" * 64)

    def download(self, path, *, most):
        with open(path, "wb") as file:
            file.write(b"something else")


def test_what_does_not_have_its_checksum_is_not_unpacked(tmp_path):
    package = RemotePackage(Lying(), archives=tmp_path / "archives", folders=tmp_path / "folders")
    with pytest.raises(PackageError, match="not the one of its checksum"):
        package.make_ready()
    assert os.listdir(tmp_path / "archives") == []
    assert not (tmp_path / "folders").exists()


def test_a_client_is_started_with_the_networks_package(tmp_path):
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SCALEOUT_")}
    settings = {"SCALEOUT_CLIENT_TASK_POLLING_INTERVAL": "0.1", "SCALEOUT_MP_TOKEN": TOKEN}
    folders = {"XDG_RUNTIME_DIR": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")}
    environment = {**plain, **settings, **folders}

    def cli(*arguments):
        return [sys.executable, "-m", "scaleout_mp", *arguments]

    with LocalNetworkThread(tmp_path / "net", token=TOKEN) as net:
        net.set_package(pack(tmp_path, "first.tgz", 1))
        process = subprocess.Popen(
            cli("client", "start", "-u", net.api_url, "-i", "r1", "-n", "remote", "--remote-package"),
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.DEVNULL,
        )
        try:
            net.wait_for(lambda event: isinstance(event, ClientConnected), timeout=30)
            assert version(net, "r1") == {"version": 1}
            done = subprocess.run(cli("status", "--json"), env=environment, check=True, capture_output=True)
            assert json.loads(done.stdout)["client_id"] == "r1"
            subprocess.run(cli("stop"), env=environment, check=True, stdout=subprocess.DEVNULL)
            assert process.wait(20) == 0
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    assert os.listdir(tmp_path / "package")
