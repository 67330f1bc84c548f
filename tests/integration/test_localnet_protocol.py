"""What a local network answers, call by call, over real HTTP and gRPC."""

from __future__ import annotations

import itertools
import json
import os
import socket
import threading

import grpc
import pytest
import requests
from scripted_client import ScriptedClient, new_id, trains_to, weights

from scaleout_mp.errors import LocalNetworkError
from scaleout_mp.localnet import ClientState, Fault, LocalNetworkThread
from scaleout_mp.localnet import rest as rest_module
from scaleout_mp.localnet.events import (
    AttributeReceived,
    BacklogReceived,
    ClientConnected,
    ClientDisconnected,
    ClientRefused,
    HeartbeatReceived,
    InferenceReceived,
    MetricReceived,
    ModelUploaded,
    PollReceived,
    StatusReceived,
    TaskDelivered,
    TaskReported,
    TelemetryReceived,
)
from scaleout_mp.model import ScaleoutModel
from scaleout_mp.wire import edge_pb2 as pb
from scaleout_mp.wire import methods

TOKEN = "a-token-for-tests"


@pytest.fixture
def net(tmp_path):
    with LocalNetworkThread(tmp_path / "net") as network:
        yield network


@pytest.fixture
def guarded(tmp_path):
    with LocalNetworkThread(tmp_path / "net", token=TOKEN, accepted_versions={"1.0.7"}) as network:
        yield network


@pytest.fixture
def edge(net):
    client = ScriptedClient(net.combiner_address, "edge")
    yield client
    client.close()


@pytest.fixture
def model():
    with ScaleoutModel.from_training_model(weights(1.0)) as model:
        yield model


def add(net, body=None, *, token=None, **changes):
    body = {"name": "edge", "client_id": "id-edge", "package": "local", **changes} if body is None else body
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return requests.post(f"{net.api_url}/api/v1/clients/add", json=body, headers=headers, timeout=5)


def access_token(net, token=TOKEN, path="/api/auth/refresh"):
    return requests.post(f"{net.api_url}{path}", json={"refresh_token": token, "role": "client"}, timeout=5)


def report(client, correlation_id, status, *, done=False, **fields):
    return pb.ActivityReport(
        node_id=client.client_id, correlation_id=correlation_id, status=status, done=done, **fields
    )


def test_a_client_is_assigned(net):
    answer = add(net)
    assert answer.status_code == 200
    host, port = net.combiner_address.split(":")
    assert answer.json() == {
        "client_id": "id-edge",
        "public_hostname": host,
        "internal_hostname": host,
        "port": int(port),
        "package": "local",
        "helper_type": "numpyhelper",
        "grpc_secure": False,
    }
    (client,) = net.clients()
    assert (client.name, client.state) == ("edge", ClientState.ASSIGNED)
    assert add(net, client_id=None).json()["client_id"]


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"name": ""}, 400, "name"),
        ({"name": 3}, 400, "name"),
        ({"package": "other"}, 400, "package"),
        ({"package": "remote"}, 203, "package"),
        ({"client_version": "9.9"}, 406, "1.0.7"),
    ],
)
def test_a_client_is_refused(guarded, changes, status, message):
    answer = add(guarded, token=TOKEN, **changes)
    assert answer.status_code == status
    assert message in answer.json()["message"]
    assert guarded.events.of(ClientRefused)[-1].http_status == status


def test_what_is_not_json_is_refused(net):
    url = f"{net.api_url}/api/v1/clients/add"
    assert requests.post(url, data="{", timeout=5).status_code == 400
    assert requests.post(url, json=[1], timeout=5).status_code == 400
    assert requests.post(f"{net.api_url}/api/auth/refresh", data="{", timeout=5).status_code == 400
    assert requests.post(f"{net.api_url}/elsewhere", timeout=5).status_code == 404


@pytest.mark.parametrize("path", ["/api/auth/refresh", "/api/v1/clients/token"])
def test_a_token_is_exchanged_and_opens_both_doors(guarded, path):
    answer = access_token(guarded, path=path)
    access = answer.json()["access_token"]
    assert answer.json()["expires_in"] == 3600
    assert add(guarded, token=access, client_version="1.0.7").status_code == 200
    client = ScriptedClient(guarded.combiner_address, "edge", token=access)
    assert client.announce("Connect").response == "OK"
    client.close()


def test_a_wrong_token_opens_nothing(guarded):
    assert access_token(guarded, "wrong").status_code == 401
    assert add(guarded).status_code == 401
    forged = access_token(guarded).json()["access_token"][:-2] + "xx"
    for token in ("wrong", "None", forged, None):
        assert add(guarded, token=token).status_code == 401
        client = ScriptedClient(guarded.combiner_address, "edge", token=token)
        with pytest.raises(grpc.RpcError) as caught:
            client.poll()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.RpcError) as caught:
            client.download("x")
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        client.close()


def test_an_access_token_expires(tmp_path):
    with LocalNetworkThread(tmp_path, token=TOKEN, token_lifetime=0) as net:
        assert add(net, token=access_token(net).json()["access_token"]).status_code == 401
        # The owner's token itself does not.
        assert add(net, token=TOKEN).status_code == 200


def test_announcements(net, edge):
    edge.announce("Connect")
    assert [client.connected for client in net.clients()] == [True]
    edge.announce("Disconnect")
    assert net.clients()[0].state is ClientState.DISCONNECTED
    # A poll that a published client's thread sends after its goodbye does not bring it back.
    edge.poll()
    assert net.clients()[0].state is ClientState.DISCONNECTED
    edge.announce("Connect")
    assert [type(event) for event in net.events.of((ClientConnected, ClientDisconnected))] == [
        ClientConnected,
        ClientDisconnected,
        ClientConnected,
    ]
    with pytest.raises(grpc.RpcError) as caught:
        edge.announce("Sing")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_the_version_check(guarded):
    client = ScriptedClient(guarded.combiner_address, "edge", token=TOKEN)
    accepted = client.announce("VersionCheck", json.dumps({"client-version": "1.0.7"}))
    assert json.loads(accepted.parameters) == {"success": True, "version": "1.0.7"}
    refused = client.announce("VersionCheck", json.dumps({"client-version": "0.1"}))
    assert json.loads(refused.parameters)["success"] is False
    assert "1.0.7" in refused.response
    client.close()


def test_models_go_up_and_down_whole(net, edge):
    with ScaleoutModel.from_training_model(weights(0.5, size=1_000_000), compression="stored") as big:
        answer = edge.upload(big)
        assert (answer.status, answer.message) == (pb.OK, "OK")
        data, checksum = edge.download(big.model_id)
        assert len(data) == big.size
        assert checksum == big.checksum
        call = edge.call(methods.DOWNLOAD, pb.ModelRequest(model_id=big.model_id))
        assert {len(chunk.data) for chunk in call} == {1 << 20, big.size % (1 << 20)}
        # A retry of the same client is fine.
        assert edge.upload(big).status == pb.OK


def test_uploads_that_are_not_kept(net, edge, model, tmp_path):
    answer = edge.upload(model, checksum="0" * 64)
    assert answer.status == pb.FAILED
    assert "checksum" in answer.message
    own = net.add_model(ScaleoutModel.from_training_model(weights(2.0)))
    for model_id in ("", "../x", ".hidden", "a/b", own):
        chunks = iter([pb.FileChunk(data=b"data")])
        refused = edge.call(methods.UPLOAD, chunks, ("model-id", model_id))
        assert refused.status == pb.FAILED, model_id
    assert edge.call(methods.UPLOAD, iter([]), ("model-id", "empty")).status == pb.FAILED
    assert not any(event.accepted for event in net.events.of(ModelUploaded))
    assert [path.stem for path in (tmp_path / "net/models").iterdir()] == [own]


def test_an_unknown_model(net, edge):
    with pytest.raises(grpc.RpcError) as caught:
        edge.download(new_id())
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_task_runs_from_queue_to_end(net, edge):
    edge.announce("Connect")
    issued = net.issue(edge.client_id, "Custom_hello", data={"parameters": {"x": 1}})
    assert edge.poll(skip=True) == []
    (task,) = edge.poll()
    assert (task.correlation_id, task.type, json.loads(task.data)) == (
        issued.correlation_id,
        "Custom_hello",
        {"parameters": {"x": 1}},
    )
    assert edge.poll(report(edge, task.correlation_id, "RUNNING")) == []
    assert issued.status == "RUNNING"
    done = report(edge, task.correlation_id, "COMPLETED", done=True, response='{"y": 2}')
    # A repeated report, whose first answer was lost, changes nothing.
    assert edge.poll(done) == edge.poll(done) == []
    outcome = issued.done(1)
    assert (outcome.completed, outcome.response) == (True, {"y": 2})
    assert [event.done for event in net.events.of(TaskReported)] == [False, True, True]
    assert not issued.abort()


def test_an_abort_is_repeated_until_the_done_report(net, edge):
    edge.announce("Connect")
    issued = net.issue(edge.client_id, "Custom_long")
    edge.poll()
    assert issued.abort()
    running = report(edge, issued.correlation_id, "RUNNING")
    for _ in range(2):
        (stop,) = edge.poll(running)
        assert (stop.correlation_id, stop.status) == (issued.correlation_id, "INTERRUPTED")
    # With the done report in the same poll a published client would start the task anew.
    assert edge.poll(report(edge, issued.correlation_id, "INTERRUPTED", done=True)) == []
    assert issued.done(1).status == "INTERRUPTED"


def test_a_task_can_be_timed_out(net, edge):
    edge.announce("Connect")
    issued = net.issue(edge.client_id, "Custom_long")
    edge.poll()
    issued.abort(status="TIMEOUT")
    assert edge.poll(report(edge, issued.correlation_id, "RUNNING"))[0].status == "TIMEOUT"


def test_a_task_whose_delivery_was_lost_goes_out_again(net, edge):
    edge.announce("Connect")
    issued = net.issue(edge.client_id, "Custom_x")
    ids = [[task.correlation_id for task in edge.poll()] for _ in range(4)]
    assert ids == [[issued.correlation_id]] * 3 + [[]]
    assert issued.done(1).status == "FAILED"
    assert [event.delivery for event in net.events.of(TaskDelivered)] == [1, 2, 3]


def test_a_task_that_a_restarted_client_no_longer_holds_has_failed(net, edge):
    edge.announce("Connect")
    issued = net.issue(edge.client_id, "Custom_x")
    edge.poll()
    edge.poll(report(edge, issued.correlation_id, "RUNNING"))
    assert edge.poll() == []
    assert "no longer holds" in issued.done(1).reason


def test_a_client_that_leaves_fails_its_tasks(net, edge):
    edge.announce("Connect")
    issued = net.issue(edge.client_id, "Custom_x")
    edge.poll()
    edge.announce("Disconnect")
    assert issued.done(1).reason == "the client disconnected"


def test_another_clients_task_cannot_be_reported(net, edge, model):
    other = ScriptedClient(net.combiner_address, "other")
    edge.announce("Connect")
    issued = net.issue(edge.client_id, "Scaleout_ModelUpdate", model_id="m")
    (task,) = edge.poll()
    other.poll(report(other, task.correlation_id, "COMPLETED", done=True))
    assert not net.events.of(TaskReported)[-1].known
    other.upload(model)
    with pytest.raises(grpc.RpcError) as caught:
        other.send_update(task, model)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert issued.status != "COMPLETED"
    other.close()


def test_an_update_needs_its_model_and_json(net, edge, model):
    task = pb.TaskRequest(correlation_id=new_id(), model_id="m")
    with pytest.raises(grpc.RpcError, match="was not uploaded"):
        edge.send_update(task, model)
    with pytest.raises(grpc.RpcError, match="meta is not JSON"):
        edge.call(methods.SEND_MODEL_UPDATE, pb.ModelUpdate(meta="{"))
    with pytest.raises(grpc.RpcError, match="data must be a JSON object"):
        edge.call(methods.SEND_MODEL_VALIDATION, pb.ModelValidation(data="[1]"))


def test_a_raw_directive_reaches_the_client(net, edge):
    edge.announce("Connect")
    net.push_directive(edge.client_id, pb.TaskRequest(correlation_id="gone", status="INTERRUPTED"))
    assert [(task.correlation_id, task.status) for task in edge.poll()] == [("gone", "INTERRUPTED")]
    assert edge.poll() == []


def test_an_autonomous_task_is_named_and_can_be_stopped(net, edge):
    correlation_id = new_id()
    first = report(edge, correlation_id, "RUNNING", command_type="Autonomous_scan", parameters='{"a": 1}')
    (named,) = edge.poll(first)
    assert (named.correlation_id, named.status) == (correlation_id, "")
    assert net.abort_task(correlation_id)
    (stop,) = edge.poll(report(edge, correlation_id, "RUNNING"))
    assert stop.status == "INTERRUPTED"


def test_the_task_stream_delivers_and_its_results_end_the_task(net, edge, model):
    model_id = net.add_model(model)
    stream = edge.call(methods.TASK_STREAM, pb.ClientAvailableMessage(client_id=edge.client_id))
    net.wait_for_clients(1, timeout=5)
    issued = net.issue(edge.client_id, "Scaleout_ModelUpdate", model_id=model_id)
    task = next(stream)
    assert task.correlation_id == issued.correlation_id
    trains_to(1.0)(edge, task)
    assert issued.done(5).completed
    second = net.issue(edge.client_id, "Scaleout_Validation", model_id=model_id)
    edge.send_validation(next(stream), {"accuracy": 1})
    assert second.done(5).completed
    stream.cancel()


def test_records_are_recorded(net, edge):
    metric = pb.ModelMetric(client_id=edge.client_id, model_id="m", round_id="r", session_id="s")
    metric.metrics.add(key="loss", value=0.5)
    metric.timestamp.FromSeconds(1_000)
    edge.call(methods.SEND_MODEL_METRIC, metric)
    metric.step.value = 0
    edge.call(methods.SEND_MODEL_METRIC, metric)
    first, second = net.events.of(MetricReceived)
    assert (first.metrics, first.model_id, first.round_id, first.session_id) == ({"loss": 0.5}, "m", "r", "s")
    assert (first.step, second.step, first.timestamp) == (None, 0, 1_000.0)

    attributes = pb.AttributeMessage(client_id=edge.client_id)
    attributes.attributes.add(key="site", value="north")
    edge.call(methods.SEND_ATTRIBUTE_MESSAGE, attributes)
    assert net.events.of(AttributeReceived)[0].attributes == {"site": "north"}
    telemetry = pb.TelemetryMessage(client_id=edge.client_id, record_id="r1")
    telemetry.telemetries.add(key="cpu_usage", value=12.5)
    edge.call(methods.SEND_TELEMETRY_MESSAGE, telemetry)
    assert net.events.of(TelemetryReceived)[0].telemetry == {"cpu_usage": 12.5}
    edge.call(methods.SEND_STATUS, pb.Status(client_id=edge.client_id, status="hm", log_level=pb.ERROR))
    assert net.events.of(StatusReceived)[0].level == "ERROR"
    edge.call(methods.SEND_HEARTBEAT, pb.Heartbeat(client_id=edge.client_id))
    assert net.events.of(HeartbeatReceived)[0].client_id == edge.client_id
    edge.call(methods.SEND_BACKLOG_REPORT, pb.BacklogReport(client_id=edge.client_id, backlog_total=3))
    assert net.events.of(BacklogReceived)[0].oldest_age_ms is None


def test_streamed_records_are_acknowledged_one_by_one(net, edge):
    telemetry = [pb.TelemetryRecord(telemetry_id=f"t{i}", key="cpu", payload='{"value": 1}') for i in range(3)]
    acks = edge.call(methods.STREAM_TELEMETRY_RECORD, iter(telemetry))
    assert [list(ack.record_ids) for ack in acks] == [["t0"], ["t1"], ["t2"]]
    attributes = iter([pb.AttributeRecord(attribute_id="a0", key="site", payload='{"value": "north"}')])
    assert [list(ack.record_ids) for ack in edge.call(methods.STREAM_ATTRIBUTE_RECORD, attributes)] == [["a0"]]
    inference = iter([pb.InferenceResult(inference_result_id="i0", node_id="n", payload="{}")])
    assert [list(ack.record_ids) for ack in edge.call(methods.STREAM_INFERENCE_RESULT, inference)] == [["i0"]]
    assert [event.record_id for event in net.events.of(TelemetryReceived)] == ["t0", "t1", "t2"]
    assert net.events.of(AttributeReceived)[0].attributes == {"site": "north"}
    assert net.events.of(InferenceReceived)[0].client_id == "n"


def test_gaps_between_polls_are_measured(net, edge):
    assert net.events.largest_gap(PollReceived, edge.client_id) == 0.0
    for _ in range(3):
        edge.poll()
    polls = net.events.of(PollReceived)
    gaps = [later.monotonic - earlier.monotonic for earlier, later in itertools.pairwise(polls)]
    assert net.events.largest_gap(PollReceived, edge.client_id) == max(gaps)


def test_planned_faults(net, edge, model):
    net.faults.add("PollAndReportAsync", Fault(code=grpc.StatusCode.UNAVAILABLE), times=2)
    for _ in range(2):
        with pytest.raises(grpc.RpcError) as caught:
            edge.poll()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert edge.poll() == []
    net.faults.add("Upload", Fault(refuse=True))
    assert edge.upload(model).status == pb.FAILED
    assert edge.upload(model).status == pb.OK
    whole, checksum = edge.download(model.model_id)
    net.faults.add("Download", Fault(truncate=10))
    assert edge.download(model.model_id) == (whole[:10], checksum)
    net.faults.add("Download", Fault(corrupt=True, omit_checksum=True))
    broken, none = edge.download(model.model_id)
    assert none is None
    assert (broken[1:], broken[0]) == (whole[1:], whole[0] ^ 1)
    net.faults.add("SendStatus", Fault(code=grpc.StatusCode.UNAVAILABLE, after=True), client_id="other")
    edge.call(methods.SEND_STATUS, pb.Status())
    net.faults.add("SendStatus", Fault(code=grpc.StatusCode.UNAVAILABLE, after=True))
    with pytest.raises(grpc.RpcError):
        edge.call(methods.SEND_STATUS, pb.Status())
    assert len(net.events.of(StatusReceived)) == 2
    net.faults.clear()


def test_an_outage_of_the_combiner(net, edge):
    address = net.combiner_address
    edge.poll()
    net.stop_combiner()
    with pytest.raises(grpc.RpcError):
        edge.poll()
    net.restart_combiner()
    assert net.combiner_address == address
    # The channel is in its backoff: wait for it to try again.
    heartbeat = pb.Heartbeat(client_id=edge.client_id)
    assert edge.call(methods.SEND_HEARTBEAT, heartbeat, wait_for_ready=True).response == "OK"


@pytest.mark.parametrize("option", ["api_port", "combiner_port"])
def test_a_port_in_use_is_one_clear_error(tmp_path, option):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        net = LocalNetworkThread(tmp_path, **{option: port})
        with pytest.raises(LocalNetworkError, match=f"127.0.0.1:{port}") as caught:
            net.start()
        assert "\n" not in str(caught.value)
        net.close()


def test_an_address_that_is_not_of_this_machine_is_said_to_be_wrong(tmp_path):
    with pytest.raises(LocalNetworkError, match=r"192\.0\.2\.1:0: Cannot assign requested address"):
        LocalNetworkThread(tmp_path, host="192.0.2.1").start()


def test_two_networks_never_share_a_port(net, tmp_path):
    port = int(net.combiner_address.split(":")[1])
    with pytest.raises(LocalNetworkError, match="in use"):
        LocalNetworkThread(tmp_path / "other", combiner_port=port).start()


def test_without_aiohttp_what_installs_it_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "aiohttp", None)
    with pytest.raises(LocalNetworkError, match=r'pip install "aiohttp>='):
        rest_module.import_web()
    with pytest.raises(LocalNetworkError, match="aiohttp"):
        LocalNetworkThread(tmp_path).start()


def test_waiting_for_what_does_not_come_says_what_did(net):
    with pytest.raises(LocalNetworkError, match="nothing happened"):
        net.wait_for(lambda event: False, timeout=0.01)
    add(net)
    with pytest.raises(LocalNetworkError, match="client edge assigned"):
        net.wait_for(lambda event: False, timeout=0.01)


def test_a_broken_listener_does_not_stop_the_network(net, caplog):
    def broken(event):
        raise RuntimeError("listener")

    unsubscribe = net.events.subscribe(broken)
    assert add(net).status_code == 200
    unsubscribe()
    assert any("listener of the local network failed" in record.message for record in caplog.records)


def test_nothing_is_left_after_close(tmp_path):
    def once(index):
        with LocalNetworkThread(tmp_path / str(index)) as net:
            client = ScriptedClient(net.combiner_address, "edge")
            client.poll()
            client.close()

    once(0)
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for index in range(1, 4):
        once(index)
    assert threading.active_count() <= threads
    # gRPC keeps a few descriptors of its own; what matters is that they do not grow with each network.
    assert len(os.listdir("/proc/self/fd")) <= files + 2


def test_a_network_can_be_closed_twice_and_not_used_after(tmp_path):
    net = LocalNetworkThread(tmp_path)
    with pytest.raises(LocalNetworkError, match="not started"):
        _ = net.network
    with net, pytest.raises(LocalNetworkError, match="already"):
        net.start()
    net.close()
    with pytest.raises(LocalNetworkError, match="does not run"):
        net.clients()


def test_a_network_that_ends_in_the_midst_of_an_upload_says_nothing_of_it(tmp_path, caplog):
    # It is the client's to try again; the network's output would end in a traceback.
    sent, over, codes = threading.Event(), threading.Event(), []

    def parts():
        yield pb.FileChunk(data=b"x" * 100)
        sent.set()
        over.wait(20)

    def upload():
        with pytest.raises(grpc.RpcError) as failure:
            edge.call(methods.UPLOAD, parts(), ("model-id", "half"))
        codes.append(failure.value.code())

    with LocalNetworkThread(tmp_path / "net") as net:
        edge = ScriptedClient(net.combiner_address, "edge")
        uploading = threading.Thread(target=upload)
        uploading.start()
        assert sent.wait(10)
        # Served after the upload, which came before.
        edge.announce("Connect")
    over.set()
    uploading.join()
    edge.close()
    assert codes[0] in {grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE}
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
