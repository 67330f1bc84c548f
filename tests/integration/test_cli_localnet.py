"""`scaleout-mp localnet` as its users run it."""

from __future__ import annotations

import json
import signal
import socket

import pytest
from programs_at_work import Program
from test_examples import DIGITS

from scaleout_mp import ConnectToApiResult, EdgeClient, GrpcEdgeClientRuntime
from scaleout_mp.config import Settings

LOCALNET = ("-m", "scaleout_mp", "localnet")
ANY_PORTS = ("--api-port", "0", "--combiner-port", "0")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_runs_until_it_is_told_to_end(tmp_path, number):
    with Program(*LOCALNET, *ANY_PORTS, "--folder", tmp_path / "network") as network:
        network.wait_for_line("API at http://127.0.0.1:", seconds=20)
        network.send(number)
        assert network.end(seconds=5) == 0
        assert network.lines[-1] == "local network stopped"
        assert "Traceback" not in network.output


def test_a_client_joins_with_what_the_network_says_although_calls_get_lost(tmp_path):
    options = ("--auth", "--client-certs", "--loss", "30", "--fault", "auth/refresh:status=503,times=1")
    with Program(*LOCALNET, *ANY_PORTS, *options, "--restart-every", "1", "--down", "0.3", cwd=tmp_path) as network:
        said = {
            name: network.wait_for_line(start, seconds=20).removeprefix(start)
            for name, start in (
                ("root", "root certificate: "),
                ("client", "client certificate: "),
                ("url", "API at "),
                ("token", "refresh token: "),
            )
        }
        certificate, key = said["client"].partition(",")[0].split(" and ")
        root = str(tmp_path / said["root"].partition(",")[0])
        settings = Settings(
            api_root_cert_path=root,
            grpc_root_cert_path=root,
            client_cert_path=str(tmp_path / certificate),
            client_key_path=str(tmp_path / key),
        )
        client = EdgeClient(runtime=GrpcEdgeClientRuntime(settings=settings))
        result, combiner = client.connect_to_api(said["url"].partition(",")[0], {"name": "n"}, token=said["token"])
        assert result is ConnectToApiResult.Assigned, combiner
        assert client.init_grpchandler(combiner)
        network.wait_for_line("client n assigned", seconds=5)
        network.send(signal.SIGTERM)
        assert network.end(seconds=5) == 0
        assert "Traceback" not in network.output


@pytest.mark.parametrize("taken", ["--api-port", "--combiner-port"])
def test_port_in_use_is_one_line(tmp_path, taken):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        with Program(*LOCALNET, *ANY_PORTS, taken, port, cwd=tmp_path) as network:
            assert network.end(seconds=20) == 1
            (line,) = network.lines
    assert line.startswith("error: cannot serve")
    assert port in line
    assert "in use" in line


def test_ctrl_c_while_a_session_waits_for_clients(tmp_path):
    with Program(DIGITS / "seed.py", cwd=tmp_path) as seed:
        assert seed.end(seconds=20) == 0
    with Program(*LOCALNET, *ANY_PORTS, "--seed", "seed.npz", "--rounds", "2", cwd=tmp_path) as network:
        network.wait_for_line("started: 2 rounds", seconds=20)
        network.send(signal.SIGINT)
        assert network.end(seconds=5) == 0
    (session,) = (tmp_path / "scaleout-localnet" / "sessions").iterdir()
    assert json.loads(session.read_text())["status"] == "ABORTED"
