"""Connecting for real: tokens of every kind, rotation, TLS, proxies, and a line for every mistake."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import threading
import time
import types

import edge_callbacks as callbacks
import grpc
import numpy as np
import pytest
from edge_running import POLLING, RunningClient
from observing import wait_until
from proxying import Proxy

from scaleout_mp import ConnectToApiResult, EdgeClient, GrpcConnectionOptions, GrpcEdgeClientRuntime, ScaleoutModel
from scaleout_mp.config import Settings
from scaleout_mp.errors import CallError
from scaleout_mp.localnet import CertificateAuthority, Fault, LocalNetworkThread, ServerTls, TokenKind
from scaleout_mp.localnet.events import (
    ClientEnrolled,
    PollReceived,
    TaskReported,
    TokenRefreshed,
    TokenRefused,
)
from scaleout_mp.supervisor import connecting
from scaleout_mp.transport import rest
from scaleout_mp.transport.calls import CombinerCalls
from scaleout_mp.transport.channel import CallCredentials, GrpcTls, open_channel
from scaleout_mp.transport.token_api import TokenApi
from scaleout_mp.transport.tokens import RefreshedToken, token_source
from scaleout_mp.wire import edge_pb2 as pb
from scaleout_mp.wire import methods


@pytest.fixture(scope="module")
def authorities(tmp_path_factory):
    folder = tmp_path_factory.mktemp("authorities")
    ours, other = CertificateAuthority(folder / "ours"), CertificateAuthority(folder / "other")
    return types.SimpleNamespace(
        root=str(ours.root),
        root_path=ours.root,
        other_root=str(other.root),
        server=ours.for_server(),
        client=ours.for_client("edge"),
        stranger=other.for_client("edge"),
        expired=ours.for_client("expired", days=-0.001),
        elsewhere=CertificateAuthority(folder / "elsewhere"),
    )


@pytest.fixture
def secure_net(tmp_path, authorities):
    tls = ServerTls(own=authorities.server)
    with LocalNetworkThread(tmp_path / "net", tls=tls, auth=True, token_lifetime=2) as network:
        yield network


def quick(**more):
    return Settings(polling_interval=POLLING, send_telemetry=False, **more)


def trusting(authorities, **more):
    return quick(api_root_cert_path=authorities.root, grpc_root_cert_path=authorities.root, **more)


def add_model(net):
    with ScaleoutModel.from_training_model([np.zeros(100, np.float32)]) as model:
        return net.add_model(model)


def trains(net, edge):
    """Have the client train once; return how that ended."""
    edge.client.set_train_callback(callbacks.train)
    task = edge.issue(model_id=add_model(net))
    task.done(20)
    (end,) = net.events.of(TaskReported, lambda event: event.correlation_id == task.correlation_id and event.done)
    return end.status


def refreshes(net):
    return net.events.of(TokenRefreshed)


def test_a_client_enrolls_rotates_and_comes_back_as_the_same_over_tls(secure_net, authorities):
    net, told = secure_net, []
    enrollment = net.issue_token(TokenKind.ENROLLMENT)

    def run():
        settings = trusting(authorities)
        with RunningClient(net, given_id=None, token=enrollment, settings=settings) as edge:
            before = len(refreshes(net))
            assert trains(net, edge) == "COMPLETED"
            # Past the life of the first token, and of those that came after it.
            wait_until(lambda: len(refreshes(net)) >= before + 3, seconds=10, what="three refreshes")
            assert trains(net, edge) == "COMPLETED"
            told.append(edge.client.client_id)

    run()
    run()
    assert told[0] == told[1]
    (enrolled,) = net.events.of(ClientEnrolled)
    assert enrolled.client_id == told[0]
    assert all(event.rotated for event in refreshes(net))
    assert net.events.of(TokenRefused) == []


def test_clients_that_enroll_with_one_token_are_clients_of_their_own_and_stay_so(secure_net, authorities, tmp_path):
    """The same name, no id: beside each other from one folder, from folders of their own, with none, and later."""
    enrollment = secure_net.issue_token(TokenKind.ENROLLMENT)
    tokens = str(tmp_path / "tokens")
    folders = [tmp_path / "one", tmp_path / "one", tmp_path / "two", ":memory:", ":memory:"]

    def connected(folder):
        client = EdgeClient(
            runtime=GrpcEdgeClientRuntime(settings=trusting(authorities, token_cache_dir=tokens), state_dir=folder)
        )
        client.set_name("edge")
        result, _ = client.connect_to_api(secure_net.api_url, token=enrollment)
        assert result is ConnectToApiResult.Assigned
        return client

    def all_at_once():
        with concurrent.futures.ThreadPoolExecutor(len(folders)) as threads:
            return list(threads.map(connected, folders))

    clients = all_at_once()
    ids = [client.client_id for client in clients]
    assert len(set(ids)) == len(folders)
    assert {event.client_id for event in secure_net.events.of(ClientEnrolled)} == set(ids)
    # Each lets go of its own with its life.
    del clients
    gc.collect()
    clients = all_at_once()
    again = [client.client_id for client in clients]
    assert [set(again[:2]), again[2], set(again[3:])] == [set(ids[:2]), ids[2], set(ids[3:])]
    assert len(secure_net.events.of(ClientEnrolled)) == len(folders)


def test_polls_stay_on_time_while_tokens_are_replaced(tmp_path, authorities):
    with LocalNetworkThread(
        tmp_path / "net", tls=ServerTls(own=authorities.server), auth=True, token_lifetime=4
    ) as net:
        token = net.issue_token(TokenKind.REFRESH)
        # Each refresh takes longer than a poll may be late, and ends well before the token does.
        net.faults.always("auth/refresh", Fault(delay=0.8))
        with RunningClient(net, token=token, settings=trusting(authorities)) as edge:
            wait_until(lambda: len(refreshes(net)) >= 3, seconds=15, what="three refreshes")
        assert net.events.largest_gap(PollReceived, edge.id) < POLLING + 0.5
        assert net.events.of(TokenRefused) == []


def test_refreshes_that_fail_or_whose_answer_is_lost_cost_nothing(secure_net, authorities, caplog):
    net = secure_net
    token = net.issue_token(TokenKind.REFRESH)
    with RunningClient(net, token=token, settings=trusting(authorities)) as edge:
        before = len(refreshes(net))
        net.faults.add("auth/refresh", Fault(status=503))
        net.faults.add("auth/refresh", Fault(after=True))
        wait_until(lambda: len(refreshes(net)) >= before + 4, seconds=20, what="refreshes after the failures")
        assert trains(net, edge) == "COMPLETED"
    assert net.events.of(TokenRefused) == []
    assert "token refresh failed" in caplog.text


def test_the_user_hears_of_every_refresh(secure_net, authorities):
    told = []
    client = EdgeClient(runtime=GrpcEdgeClientRuntime(settings=trusting(authorities)))
    token = secure_net.issue_token(TokenKind.REFRESH)
    result, options = client.connect_to_api(secure_net.api_url, {"name": "n"}, token=token)
    assert result is ConnectToApiResult.Assigned
    # As published clients do: the same token once more, now with a callback.
    assert client.init_grpchandler(
        options, token=token, url=secure_net.api_url + "/", token_refresh_callback=lambda *args: told.append(args)
    )
    wait_until(lambda: client.get_access_token() and told, seconds=5, what="a refresh")
    access, refresh, expires_at = told[0]
    assert expires_at.timestamp() > time.time() - 5
    assert access == client.get_access_token() or len(told) > 1
    assert refresh != token
    assert secure_net.events.of(TokenRefused) == []


def test_an_api_key_is_used_as_it_is_until_it_is_revoked(secure_net, authorities):
    key = secure_net.issue_token(TokenKind.API_KEY)
    client = EdgeClient(runtime=GrpcEdgeClientRuntime(settings=trusting(authorities)))
    result, options = client.connect_to_api(secure_net.api_url, {"name": "n"}, token=key)
    assert result is ConnectToApiResult.Assigned
    assert client.init_grpchandler(options)
    secure_net.revoke_token(key)
    result, message = client.connect_to_api(secure_net.api_url, {"name": "n"}, token=key)
    assert result is ConnectToApiResult.UnAuthorized
    assert "\n" not in message
    assert refreshes(secure_net) == []


@pytest.mark.parametrize(
    ("kind", "says"),
    [(TokenKind.ENROLLMENT, "refused the enrollment token"), (TokenKind.REFRESH, "refused the refresh token")],
)
def test_a_token_that_was_revoked_is_one_line(secure_net, authorities, kind, says, caplog):
    token = secure_net.issue_token(kind)
    secure_net.revoke_token(token)
    client = EdgeClient(runtime=GrpcEdgeClientRuntime(settings=trusting(authorities)))
    result, message = client.connect_to_api(secure_net.api_url, {"name": "n"}, token=token)
    assert result is ConnectToApiResult.UnAuthorized
    assert says in message
    assert "revoked" in message
    assert "\n" not in message


def test_calls_that_find_the_token_expired_at_once_refresh_it_once(tmp_path, authorities):
    now = [time.time()]
    with LocalNetworkThread(
        tmp_path / "net", auth=True, tls=ServerTls(own=authorities.server), wall_clock=lambda: now[0]
    ) as net:
        api = TokenApi(net.api_url, settings=trusting(authorities), clock=lambda: now[0])
        source = RefreshedToken(net.issue_token(TokenKind.REFRESH), api, clock=lambda: now[0])
        source.access_token()
        now[0] += 3_600
        before = len(refreshes(net))
        call_often(net, source, authorities)
        assert len(refreshes(net)) == before + 1


def call_often(net, source, authorities):
    async def call():
        host, port = net.combiner_address.split(":")
        channel = open_channel(host, int(port), secure=True, tls=GrpcTls(roots=authorities.root))
        calls = CombinerCalls(channel, CallCredentials(client_id="c", name="n", tokens=source))
        try:
            beat = pb.Heartbeat(client_id="c")
            await asyncio.gather(*(calls.once(methods.SEND_HEARTBEAT, beat) for _ in range(50)))
        finally:
            await calls.aclose()

    asyncio.run(call())


def test_threads_that_find_the_token_expired_at_once_refresh_it_once(secure_net, authorities):
    net = secure_net
    source = token_source(net.issue_token(TokenKind.REFRESH), net.api_url, settings=trusting(authorities))
    gate = threading.Barrier(8)

    def ask():
        gate.wait()
        source.access_token()

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refreshes(net)) == 1


# TLS that does not come about


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def options_of(net, *, secure):
    host, port = net.combiner_address.split(":")
    return GrpcConnectionOptions(host, int(port), grpc_secure=secure)


@pytest.mark.parametrize(
    ("server", "settings", "says"),
    [
        ("plain", {"root": "root"}, "does not speak TLS; SCALEOUT_GRPC_SECURE=false"),
        ("tls", {"secure": False}, "speaks TLS; SCALEOUT_GRPC_SECURE=true"),
        ("tls", {}, "unable to get local issuer certificate; SCALEOUT_GRPC_ROOT_CERT_PATH"),
        ("tls", {"root": "other_root"}, "unable to get local issuer certificate; SCALEOUT_GRPC_ROOT_CERT_PATH"),
        ("elsewhere", {"root": "elsewhere"}, "IP address mismatch"),
        ("mutual", {"root": "root"}, "wants a client certificate; SCALEOUT_MP_CLIENT_CERT_PATH"),
        ("mutual", {"root": "root", "client": "stranger"}, "does not accept the certificate"),
        ("mutual", {"root": "root", "client": "expired"}, "does not accept the certificate"),
        ("expired", {"root": "elsewhere"}, "has expired; its owner has to renew it, unless this machine's clock"),
    ],
)
def test_tls_that_cannot_work_is_said_at_once(tmp_path, authorities, server, settings, says, caplog):
    tls = {
        "plain": lambda: None,
        "tls": lambda: ServerTls(own=authorities.server),
        "elsewhere": lambda: ServerTls(own=authorities.elsewhere.for_server(["elsewhere.example"])),
        "expired": lambda: ServerTls(own=authorities.elsewhere.for_server(days=-0.001)),
        "mutual": lambda: ServerTls(own=authorities.server, clients_from=authorities.root_path),
    }
    root = {
        "root": authorities.root,
        "other_root": authorities.other_root,
        "elsewhere": str(authorities.elsewhere.root),
    }
    secure = settings.get("secure", True)
    pair = getattr(authorities, settings["client"]) if "client" in settings else None
    own = quick(
        grpc_root_cert_path=root.get(settings.get("root")),
        client_cert_path=None if pair is None else str(pair.certificate),
        client_key_path=None if pair is None else str(pair.key),
    )
    with LocalNetworkThread(tmp_path / "net", tls=tls[server]()) as net:
        client = EdgeClient(runtime=GrpcEdgeClientRuntime(settings=own))
        client.set_client_id("c")
        before = time.monotonic()
        assert client.init_grpchandler(options_of(net, secure=secure)) is False
    (line,) = lines(caplog)
    assert says in line
    assert "\n" not in line
    # No retries: nothing can change.
    assert time.monotonic() - before < 3


def test_a_client_with_the_right_certificate_is_let_in_both_doors(tmp_path, authorities):
    tls = ServerTls(own=authorities.server, clients_from=authorities.root_path)
    own = {"client_cert_path": str(authorities.client.certificate), "client_key_path": str(authorities.client.key)}
    with LocalNetworkThread(tmp_path / "net", tls=tls) as net:
        with RunningClient(net, settings=trusting(authorities, **own)) as edge:
            assert trains(net, edge) == "COMPLETED"
        client = EdgeClient(runtime=GrpcEdgeClientRuntime(settings=trusting(authorities)))
        result, message = client.connect_to_api(net.api_url, {"name": "n"})
        assert result is ConnectToApiResult.UnknownError
        assert "client certificate" in message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"grpc_root_cert_path": "{tmp}/none.pem"}, "none.pem: No such file"),
        ({"grpc_root_cert_path": "{tmp}/text"}, "no certificate in PEM form"),
        ({"client_cert_path": "{tmp}/none.pem", "client_key_path": "{tmp}/none.key"}, "No such file"),
        ({"client_cert_path": "{tmp}/text", "client_key_path": "{tmp}/text"}, "no certificate and key in PEM form"),
        ({"client_cert_path": "{client.certificate}", "client_key_path": "{stranger.key}"}, "do not belong together"),
        ({"client_cert_path": "{client.certificate}", "client_key_path": "{tmp}/locked.key"}, "has a password"),
    ],
)
def test_certificate_files_that_are_no_good_are_one_line(tmp_path, authorities, change, says, caplog):
    (tmp_path / "text").write_text("no certificate")
    lock_key(authorities.client.key, tmp_path / "locked.key")
    texts = {
        name: value.format(tmp=tmp_path, client=authorities.client, stranger=authorities.stranger)
        for name, value in change.items()
    }
    client = EdgeClient(runtime=GrpcEdgeClientRuntime(settings=quick(**texts)))
    assert client.init_grpchandler(GrpcConnectionOptions("127.0.0.1", 1, grpc_secure=True)) is False
    (line,) = lines(caplog)
    assert says in line
    assert "\n" not in line


def lock_key(plain, locked):
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(plain.read_bytes(), None)
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"api_root_cert_path": None}, "REQUESTS_CA_BUNDLE"),
        ({"api_root_cert_path": "{tmp}/none.pem"}, "none.pem"),
        ({"api_root_cert_path": "{tmp}/text"}, "holds none"),
        ({"client_cert_path": "{tmp}/none.pem", "client_key_path": "{tmp}/none.pem"}, "none.pem"),
        ({"client_cert_path": "{client.certificate}", "client_key_path": "{stranger.key}"}, "do not belong together"),
    ],
)
def test_an_api_that_cannot_be_trusted_is_one_line(secure_net, authorities, tmp_path, change, says):
    (tmp_path / "text").write_text("no certificate")
    texts = {
        name: value and value.format(tmp=tmp_path, client=authorities.client, stranger=authorities.stranger)
        for name, value in change.items()
    }
    settings = quick(**{"api_root_cert_path": authorities.root, **texts})
    client = EdgeClient(runtime=GrpcEdgeClientRuntime(settings=settings))
    result, message = client.connect_to_api(secure_net.api_url, {"name": "n"})
    assert result is ConnectToApiResult.UnknownError
    assert says in message
    assert "\n" not in message


def test_certificates_are_not_verified_when_the_user_says_so_and_the_log_does(secure_net, caplog):
    client = EdgeClient(runtime=GrpcEdgeClientRuntime(settings=quick(verify_api_certificates=False)))
    token = secure_net.issue_token(TokenKind.API_KEY)
    result, options = client.connect_to_api(secure_net.api_url, {"name": "n"}, token=token)
    assert result is ConnectToApiResult.Assigned
    assert options.grpc_secure is True
    assert "is not verified, by SCALEOUT_CONNECT_API_SECURE" in caplog.text
    # That is for the API alone.
    assert client.init_grpchandler(options) is False


# Proxies


def test_api_and_combiner_are_reached_through_the_proxy_of_the_environment(secure_net, authorities, monkeypatch):
    with Proxy() as proxy:
        # In capitals: gRPC by itself does not read these.
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        token = secure_net.issue_token(TokenKind.REFRESH)
        with RunningClient(secure_net, token=token, settings=trusting(authorities)) as edge:
            assert trains(secure_net, edge) == "COMPLETED"
    api = secure_net.api_url.removeprefix("https://")
    assert {api, secure_net.combiner_address} == set(proxy.tunnels)


def test_hosts_that_need_no_proxy_are_reached_without(secure_net, authorities, monkeypatch):
    with Proxy(refuses=True) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        # As requests reads it; gRPC by itself does not know networks.
        monkeypatch.setenv("no_proxy", "127.0.0.0/8")
        token = secure_net.issue_token(TokenKind.REFRESH)
        with RunningClient(secure_net, token=token, settings=trusting(authorities)):
            pass
    assert proxy.tunnels == []


def test_without_tls_the_proxy_for_http_counts(tmp_path, monkeypatch):
    with Proxy() as proxy, LocalNetworkThread(tmp_path / "net") as net:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        with RunningClient(net):
            pass
    assert proxy.requests == [f"{net.api_url}/api/v1/clients/add"]
    assert set(proxy.tunnels) == {net.combiner_address}


def test_a_proxy_that_wants_another_password_is_named_without_it(monkeypatch, caplog):
    with Proxy(refuses=407) as proxy:
        for variable in ("HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(variable, proxy.url.replace("//", "//user:secret@"))
        monkeypatch.setattr(rest, "TRIES", 1)
        monkeypatch.setattr(connecting, "_VERSION_TRIES", 2)
        client = EdgeClient(runtime=GrpcEdgeClientRuntime(settings=quick()))
        for url in ("https://api.example", "http://api.example"):
            result, message = client.connect_to_api(url, {"name": "n"})
            assert result is not ConnectToApiResult.Assigned
            assert "it wants a name and a password: HTTPS_PROXY=" in message
        client.set_client_id("c")
        assert client.init_grpchandler(GrpcConnectionOptions("combiner.example", 443, grpc_secure=True)) is False
        line = lines(caplog)[-1]
        assert f"combiner.example:443 (TLS on, through the proxy {proxy.url})" in line
        assert "code 407" in line
    assert "secret" not in caplog.text
    assert {"api.example:443", "combiner.example:443"} == set(proxy.tunnels)


@pytest.mark.parametrize("scheme", ["https", "socks5"])
def test_a_proxy_that_grpc_cannot_use_is_one_line(monkeypatch, scheme, caplog):
    monkeypatch.setenv("HTTPS_PROXY", f"{scheme}://user:secret@proxy.example:1")
    client = EdgeClient(runtime=GrpcEdgeClientRuntime(settings=quick()))
    assert client.init_grpchandler(GrpcConnectionOptions("combiner.example", 1, grpc_secure=True)) is False
    (line,) = lines(caplog)
    assert "needs a proxy that starts with http://" in line
    assert "secret" not in line


# Tokens stay where they are


def test_no_token_is_in_any_line_whatever_the_server_says(tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    secret = "a-secret-that-nobody-reads"
    with LocalNetworkThread(tmp_path / "net", token=secret) as net:
        key = net.issue_token(TokenKind.API_KEY)
        for status in (400, 401, 403, 404, 406, 418):
            for call, token in (("auth/refresh", secret), ("clients/add", key)):
                net.faults.add(call, Fault(status=status, details=f"you said {token}"), times=2)
                client = EdgeClient(runtime=GrpcEdgeClientRuntime(settings=quick()))
                outcome = client.connect_to_api(net.api_url, {"name": "n"}, token=token)
                assert token not in f"{outcome!r} {client!r} {client._runtime!r} {vars(client._runtime)!r}"
                net.faults.clear()
        with RunningClient(net, token=secret) as edge:
            access = edge.client.get_access_token()
            said = f"you said {access}"
            net.faults.add("PollAndReportAsync", Fault(code=grpc.StatusCode.INTERNAL, details=said))
            wait_until(lambda: "INTERNAL you said" in caplog.text, what="the server's words in the log")
            net.faults.add("Download", Fault(code=grpc.StatusCode.INVALID_ARGUMENT, details=f"{access}!"))
            with pytest.raises(CallError, match="INVALID_ARGUMENT") as caught:
                edge.runtime.get_model_from_combiner("m")
            assert access not in str(caught.value)
            net.faults.add("PollAndReportAsync", Fault(code=grpc.StatusCode.UNAUTHENTICATED, details=said), times=2)
            wait_until(lambda: "refused a fresh token" in caplog.text, what="the refusal in the log")
    out, err = capfd.readouterr()
    for held in (access, secret, key):
        assert held not in caplog.text + out + err


def test_a_password_in_the_url_stays_there(caplog):
    client = EdgeClient(runtime=GrpcEdgeClientRuntime(settings=quick()))
    for url in ("http://user:secret@host:x", "ftp://user:secret@host", "http://user:secret@"):
        _, message = client.connect_to_api(url, {"name": "n"})
        assert "secret" not in message + caplog.text


def test_url_and_token_in_each_others_place_are_seen(secure_net):
    client = EdgeClient(runtime=GrpcEdgeClientRuntime(settings=quick()))
    token = secure_net.issue_token(TokenKind.API_KEY)
    result, message = client.connect_to_api(token, {"name": "n"}, token=secure_net.api_url)
    assert result is ConnectToApiResult.IncorrectUrl
    assert "looks like a token" in message
    assert token not in message


def test_a_task_does_not_find_the_token_in_its_environment(secure_net, authorities, monkeypatch):
    token = secure_net.issue_token(TokenKind.REFRESH)
    monkeypatch.setenv("SCALEOUT_AUTH_TOKEN", token)
    monkeypatch.setenv("MY_SETTINGS", f"--token={token} --more")
    for method in ("template", "spawn"):
        with RunningClient(secure_net, token=token, settings=trusting(authorities), start_method=method) as edge:
            edge.client.set_custom_callback("environ", callbacks.environ)
            task = edge.issue("Custom_environ")
            outcome = task.done(20)
        assert "PATH" in outcome.response
        assert token not in str(outcome.response)
