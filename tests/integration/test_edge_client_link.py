"""The edge client when the link, the server or the user's set-up goes wrong."""

from __future__ import annotations

import gc
import itertools
import logging
import threading
import time

import edge_callbacks as callbacks
import grpc
import numpy as np
import pytest
from edge_running import POLLING, RunningClient
from observing import open_descriptors, wait_until

from scaleout_mp import (
    CallbackNotSendable,
    ConfigError,
    ConnectToApiResult,
    EdgeClient,
    GrpcEdgeClientRuntime,
    ScaleoutModel,
)
from scaleout_mp.config import Settings
from scaleout_mp.errors import AuthenticationError
from scaleout_mp.localnet import Fault, LocalNetworkThread
from scaleout_mp.localnet.events import MetricReceived, PollReceived, TaskReported, UpdateReceived
from scaleout_mp.wire import edge_pb2 as pb

UNAVAILABLE = Fault(code=grpc.StatusCode.UNAVAILABLE)


@pytest.fixture
def net(tmp_path):
    with LocalNetworkThread(tmp_path / "net") as network:
        yield network


@pytest.fixture
def locked_net(tmp_path):
    with LocalNetworkThread(tmp_path / "locked", token="secret", token_lifetime=2) as network:
        yield network


def add_model(net):
    with ScaleoutModel.from_training_model([np.zeros(1_000, np.float32)]) as model:
        return net.add_model(model)


@pytest.fixture
def model_id(net):
    return add_model(net)


def one_end(net, task, timeout=20):
    task.done(timeout)
    (end,) = net.events.of(TaskReported, lambda event: event.correlation_id == task.correlation_id and event.done)
    return end


@pytest.mark.parametrize(
    ("method", "code"),
    [
        ("SendModelMetric", "RESOURCE_EXHAUSTED"),
        ("SendModelUpdate", "UNAVAILABLE"),
        ("SendStatus", "CANCELLED"),
        ("PollAndReportAsync", "UNAVAILABLE"),
        ("Download", "UNAVAILABLE"),
        ("Upload", "CANCELLED"),
    ],
)
def test_calls_that_fail_for_a_moment_are_made_again(net, model_id, method, code):
    with RunningClient(net) as edge:
        edge.client.set_train_callback(callbacks.Worker(edge.client).train)
        net.faults.add(method, Fault(code=grpc.StatusCode[code]), times=2)
        end = one_end(net, edge.issue(model_id=model_id, settings={"epochs": 3}))
    assert end.status == "COMPLETED"
    assert [event.step for event in net.events.of(MetricReceived)] == [0, 1, 2]
    assert len(net.events.of(UpdateReceived)) == 1


def test_an_update_whose_answer_got_lost_is_sent_again_and_the_task_ends_once(net, model_id):
    net.faults.add("SendModelUpdate", Fault(code=grpc.StatusCode.UNAVAILABLE, after=True))
    with RunningClient(net) as edge:
        edge.client.set_train_callback(callbacks.train)
        end = one_end(net, edge.issue(model_id=model_id))
    assert end.status == "COMPLETED"
    first, second = net.events.of(UpdateReceived)
    assert first.model_update_id == second.model_update_id


def test_a_poll_that_fails_for_good_does_not_end_polling(net, caplog):
    with RunningClient(net):
        net.faults.add("PollAndReportAsync", Fault(code=grpc.StatusCode.INTERNAL, details="bug"))
        wait_until(lambda: "polling failed: PollAndReportAsync: INTERNAL bug" in caplog.text, what="the failed poll")
        before = len(net.events.of(PollReceived))
        wait_until(lambda: len(net.events.of(PollReceived)) > before + 2, what="polls after the failure")


def test_a_done_report_is_repeated_until_it_is_accepted_and_the_task_runs_once(net, tmp_path):
    path = tmp_path / "runs"
    with RunningClient(net) as edge:
        edge.client.set_custom_callback("count", callbacks.count_runs)
        task = edge.issue("Custom_count", parameters={"path": str(path)})
        again = pb.TaskRequest(correlation_id=task.correlation_id, type="Custom_count", data='{"parameters": {}}')
        net.push_directive(edge.id, again)
        net.faults.add("PollAndReportAsync", Fault(code=grpc.StatusCode.UNAVAILABLE, after=True), times=1)
        assert task.done(10).status == "COMPLETED"
        # Once more after the end was accepted: the same answer, not another run.
        wait_until(lambda: edge.runtime.snapshot().tasks == (), what="the end")
        held_by = net.events.of(PollReceived)[-1].monotonic
        net.push_directive(edge.id, again)
        net.wait_for(
            lambda event: (
                isinstance(event, TaskReported)
                and event.correlation_id == task.correlation_id
                and event.monotonic > held_by + POLLING
            ),
            timeout=5,
        )
    reports = net.events.of(TaskReported, lambda event: event.done)
    assert {(event.status, event.response["ok"]) for event in reports} == {("COMPLETED", True)}
    assert path.read_text() == "run\n"


@pytest.mark.parametrize("status", ["INTERRUPTED", "TIMEOUT"])
def test_an_abort_for_an_unknown_task_is_answered_and_starts_nothing(net, status, tmp_path):
    path = tmp_path / "runs"
    data = f'{{"parameters": {{"path": "{path}"}}}}'
    with RunningClient(net) as edge:
        edge.client.set_custom_callback("count", callbacks.count_runs)
        request = pb.TaskRequest(correlation_id="unknown", type="Custom_count", data=data, status=status)
        net.push_directive(edge.id, request)
        end = net.wait_for(lambda event: isinstance(event, TaskReported) and event.done, timeout=5)
    assert (end.correlation_id, end.status) == ("unknown", "INTERRUPTED")
    assert not path.exists()


@pytest.mark.parametrize(
    "fault",
    [Fault(truncate=100), Fault(corrupt=True), Fault(truncate=100, omit_checksum=True), Fault(truncate=0)],
)
def test_a_model_that_arrives_broken_is_fetched_again(net, model_id, fault):
    net.faults.add("Download", fault, times=2)
    with RunningClient(net) as edge:
        edge.client.set_train_callback(callbacks.train)
        assert one_end(net, edge.issue(model_id=model_id)).status == "COMPLETED"
        net.faults.add("Download", fault, times=3)
        end = one_end(net, edge.issue(model_id=model_id))
    assert end.status == "FAILED"
    assert f"model {model_id} arrived broken 3 times" in end.response["error"]


@pytest.mark.parametrize(("refusals", "status"), [(2, "COMPLETED"), (3, "FAILED")])
def test_a_refused_upload_is_tried_again_and_then_the_task_has_failed(net, model_id, refusals, status):
    net.faults.add("Upload", Fault(refuse=True, details="disk full"), times=refusals)
    with RunningClient(net) as edge:
        edge.client.set_train_callback(callbacks.train)
        end = one_end(net, edge.issue(model_id=model_id))
    assert end.status == status
    assert len(net.events.of(UpdateReceived)) == (status == "COMPLETED")
    if status == "FAILED":
        assert "disk full" in end.response["error"]


def test_a_task_runs_on_through_an_outage_and_all_is_delivered_in_order(net, model_id, tmp_path, caplog):
    until = tmp_path / "until"
    caplog.set_level(logging.INFO)
    with RunningClient(net) as edge:
        edge.client.set_train_callback(callbacks.Worker(edge.client).log_for)
        task = edge.issue(model_id=model_id, settings={"until": str(until)})
        net.wait_for(lambda event: isinstance(event, MetricReceived), timeout=10)
        net.stop_combiner()
        wait_until(lambda: not edge.runtime.snapshot().connected, what="the outage to be noticed")
        waiting = edge.runtime.snapshot().pending_messages
        wait_until(lambda: edge.runtime.snapshot().pending_messages > waiting + 5, what="metrics of the outage")
        until.touch()
        wait_until(lambda: edge.runtime.snapshot().tasks[0].phase == "uploading", what="the end of the training")
        net.restart_combiner()
        end = one_end(net, task)
    assert end.status == "COMPLETED"
    (update,) = net.events.of(UpdateReceived)
    steps = [event.step for event in net.events.of(MetricReceived)]
    # A call whose answer was lost with the link is made again.
    assert [step for step, _ in itertools.groupby(steps)] == list(range(update.meta["steps"]))
    assert "answers again" in caplog.text
    warnings = [record for record in caplog.records if getattr(record, "action", "") == "link_failed"]
    assert len([record for record in warnings if record.levelno == logging.WARNING]) <= 3


def test_a_link_that_fails_is_degraded_until_it_has_answered_for_a_while(net, caplog):
    caplog.set_level(logging.INFO)
    with RunningClient(net) as edge:
        wait_until(lambda: edge.runtime.snapshot().round_trip, what="a round trip")
        assert edge.client.link_quality == "healthy"
        net.stop_combiner()
        wait_until(lambda: edge.client.link_quality == "degraded", what="the channel's failure")
        net.restart_combiner()
        wait_until(lambda: edge.client.link_quality == "healthy", seconds=15, what="five good round trips")
    assert caplog.text.count("the link is degraded: the channel cannot connect") == 1


def test_a_token_that_expires_or_is_refused_is_replaced(locked_net):
    told = []
    net = locked_net
    with RunningClient(net, token="secret") as edge:
        edge.client.set_train_callback(callbacks.train)
        model_id = add_model(net)
        first = edge.client.get_access_token()
        net.faults.add("PollAndReportAsync", Fault(code=grpc.StatusCode.UNAUTHENTICATED))
        net.faults.add("Download", Fault(code=grpc.StatusCode.UNAUTHENTICATED))
        assert one_end(net, edge.issue(model_id=model_id)).status == "COMPLETED"
        wait_until(lambda: edge.client.get_access_token() != first, what="another token")
        # Past the life of the first token and of those that replaced it.
        deadline = time.monotonic() + 2.5
        wait_until(lambda: time.monotonic() > deadline)
        assert one_end(net, edge.issue(model_id=model_id)).status == "COMPLETED"
        told.append(edge.runtime.snapshot().connected)
    assert told == [True]
    assert net.events.largest_gap(PollReceived, edge.id) < POLLING + 1.0


def test_a_refused_token_is_one_line(locked_net, caplog):
    client = EdgeClient(runtime=GrpcEdgeClientRuntime(settings=Settings()))
    result, message = client.connect_to_api(locked_net.api_url, {"name": "n"}, token="wrong")
    assert result is ConnectToApiResult.UnAuthorized
    assert "refused the refresh token" in message
    assert "\n" not in message
    assert message in caplog.text


def test_a_combiner_that_wants_a_token_is_one_line(locked_net, caplog):
    connected = EdgeClient(runtime=GrpcEdgeClientRuntime(settings=Settings()))
    _, options = connected.connect_to_api(locked_net.api_url, {"name": "n"}, token="secret")
    for checks, expect in ((True, "wants a token"), (False, None)):
        client = EdgeClient(train_callback=callbacks.train, runtime=runtime(check_version=checks))
        client.set_client_id("i")
        if expect:
            assert client.init_grpchandler(options) is False
            assert expect in caplog.text
        else:
            assert client.init_grpchandler(options) is True
            with pytest.raises(AuthenticationError, match="wants a token"):
                client.run()


def runtime(**settings):
    return GrpcEdgeClientRuntime(settings=Settings(polling_interval=POLLING, send_telemetry=False, **settings))


@pytest.mark.parametrize(
    ("url", "says"), [("ftp://host", "http:// or https://"), ("", "must be like"), ("http://host:x", "cannot be read")]
)
def test_what_is_no_url_is_one_line(url, says):
    result, message = EdgeClient(runtime=runtime()).connect_to_api(url, {"name": "n"}, token="t")
    assert result is ConnectToApiResult.IncorrectUrl
    assert says in message


def test_another_web_server_is_the_wrong_url(net):
    result, message = EdgeClient(runtime=runtime()).connect_to_api(f"{net.api_url}/elsewhere", {"name": "n"})
    assert result is ConnectToApiResult.IncorrectUrl
    assert "no Scaleout API" in message


def test_a_version_that_the_server_does_not_take_is_one_line(tmp_path, caplog):
    with LocalNetworkThread(tmp_path / "net", accepted_versions={"9.9"}) as net:
        accepted = EdgeClient(runtime=runtime(client_version="9.9"))
        result, options = accepted.connect_to_api(net.api_url, {"name": "n"})
        assert result is ConnectToApiResult.Assigned
        client = EdgeClient(runtime=runtime())
        result, _ = client.connect_to_api(net.api_url, {"name": "n"})
        assert result is ConnectToApiResult.UnMatchedConfig
        assert client.init_grpchandler(options) is False
        assert "does not take clients of version 1.0.7" in caplog.text
        assert EdgeClient(runtime=runtime(check_version=False)).init_grpchandler(options) is True


class WhenLogged(logging.Handler):
    """Calls a function, once, in a thread of its own, when something is logged."""

    def __init__(self, text, act):
        super().__init__()
        self.text, self.act = text, act
        self.thread = None

    def emit(self, record):
        if self.thread is None and self.text in record.getMessage():
            self.thread = threading.Thread(target=self.act)
            self.thread.start()

    def __enter__(self):
        logging.getLogger("scaleout_mp").addHandler(self)
        return self

    def __exit__(self, *_):
        logging.getLogger("scaleout_mp").removeHandler(self)
        if self.thread is not None:
            self.thread.join()


def test_a_combiner_that_is_down_at_the_start_is_waited_for(net, caplog):
    client = EdgeClient(runtime=runtime())
    _, options = client.connect_to_api(net.api_url, {"name": "n"})
    net.stop_combiner()
    with WhenLogged("UNAVAILABLE", net.restart_combiner) as handler:
        assert client.init_grpchandler(options) is True
    assert handler.thread is not None
    assert "trying again in" in caplog.text


def test_a_run_whose_combiner_is_down_can_be_stopped(net):
    client = EdgeClient(train_callback=callbacks.train, runtime=runtime())
    _, options = client.connect_to_api(net.api_url, {"name": "n"})
    assert client.init_grpchandler(options)
    net.stop_combiner()
    with WhenLogged("UNAVAILABLE", client._runtime.stop):
        before = time.monotonic()
        client.run()
    assert time.monotonic() - before < 5


def test_run_says_what_is_missing_before_it_connects(net):
    client = EdgeClient(runtime=runtime())
    _, options = client.connect_to_api(net.api_url, {"name": "n"})
    assert client.init_grpchandler(options)
    with pytest.raises(ConfigError, match="no callback registered"):
        client.run()
    lock = threading.Lock()
    client.set_train_callback(lambda model, settings: lock)
    with pytest.raises(CallbackNotSendable, match="lock") as caught:
        client.run()
    assert "\n" not in str(caught.value)
    assert net.events.of(PollReceived) == []
    client.set_client_id("")
    with pytest.raises(ConfigError, match="no id"):
        client.run()


def test_what_a_program_logs_before_and_during_the_run_arrives(net):
    edge = RunningClient(net)
    assert edge.client.init_grpchandler(edge.options)
    assert edge.client.log_telemetry({"before": 1})
    with edge:
        assert edge.client.log_attributes({"during": 1})
        net.wait_for(lambda event: getattr(event, "attributes", None) == {"during": "1"}, timeout=5)
        net.wait_for(lambda event: getattr(event, "telemetry", None) == {"before": 1.0}, timeout=5)


def test_a_client_runs_again_and_leaves_no_descriptor_behind(net, model_id):
    left = []
    edge = RunningClient(net)
    edge.client.set_train_callback(callbacks.train)
    for _ in range(3):
        with edge:
            assert one_end(net, edge.issue(model_id=model_id)).status == "COMPLETED"
        edge.renew()
        gc.collect()
        left.append(len(open_descriptors()))
    assert left[1] == left[2]
