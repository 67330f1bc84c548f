"""What the client makes of answers that no server should give, and of tasks that cannot be served."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import itertools
import threading

import edge_callbacks as callbacks
import grpc
import numpy as np
import pytest
from edge_running import POLLING, RunningClient
from observing import wait_until

from scaleout_mp import EdgeClient, GrpcConnectionOptions, GrpcEdgeClientRuntime, ScaleoutModel
from scaleout_mp.config import Settings
from scaleout_mp.errors import CallError, ModelTransferError
from scaleout_mp.localnet import LocalNetworkThread
from scaleout_mp.localnet.events import TaskReported
from scaleout_mp.transport.backoff import Backoff
from scaleout_mp.transport.calls import CombinerCalls
from scaleout_mp.transport.channel import CallCredentials, open_channel
from scaleout_mp.transport.transfer import ModelTransfer
from scaleout_mp.wire import edge_pb2 as pb
from scaleout_mp.wire import methods
from scaleout_mp.wire.directives import read_directive, read_task

GOOD = pb.TaskRequest(correlation_id="good", type="Custom_answer", data='{"parameters": {}}').SerializeToString()
NO_TEXT = b"\xff\xfe"


def field(number, data):
    return bytes([number << 3 | 2, len(data)]) + data


def directive(*tasks):
    return b"".join(field(1, task) for task in tasks)


def broken_task(correlation_id=b"broken"):
    """A task whose data are no UTF-8."""
    return field(5, correlation_id) + field(11, b"Custom_answer") + field(4, NO_TEXT)


@pytest.mark.parametrize(
    ("data", "ids", "problems"),
    [
        (directive(GOOD), ["good"], [""]),
        (directive(broken_task(), GOOD), ["broken", "good"], ["whose data cannot be read", ""]),
        (directive(GOOD, broken_task(NO_TEXT)), ["good", ""], ["", "correlation_id and data"]),
        (directive(b"\x2a\x7fx", GOOD), ["", "good"], ["a task that cannot be read", ""]),
        (directive(GOOD, field(99 & 15, b"x")), ["good", ""], ["", ""]),
        (b"", [], []),
    ],
)
def test_a_task_that_cannot_be_read_costs_no_other(data, ids, problems):
    read = read_directive(data)
    assert [task.request.correlation_id for task in read.tasks] == ids
    for task, said in zip(read.tasks, problems, strict=True):
        assert said in task.problem
        assert bool(said) is bool(task.problem)
        assert "\n" not in task.problem
    assert read.problem == ""


def test_what_is_no_directive_says_so():
    assert "no directive" in read_directive(b"\x0a\x7f").problem
    assert read_task(GOOD).request.type == "Custom_answer"


class RawServer:
    """A combiner whose answers to polls, and whose stream of tasks, are bytes."""

    def __init__(self, answers, *, stream=(), codes=None):
        """`codes`: of the calls that fail, by name: the first tries with these, further ones with the last."""
        self._codes = {name: list(found) for name, found in (codes or {}).items()}
        self._answers, self._lock = itertools.chain(answers, itertools.repeat(b"")), threading.Lock()
        self._stream = stream
        self.reports = []
        #: Streams that were opened.
        self.streams = 0
        ok = pb.Response(response="OK").SerializeToString()
        handlers = {
            method.name: grpc.unary_unary_rpc_method_handler(functools.partial(self._answer, method.name, ok))
            for method in vars(methods).values()
            if isinstance(method, methods.Method) and not method.stream_in and not method.stream_out
        }
        handlers[methods.POLL_AND_REPORT.name] = grpc.unary_unary_rpc_method_handler(self._poll)
        handlers[methods.TASK_STREAM.name] = grpc.unary_stream_rpc_method_handler(self._tasks)
        garbage = {
            methods.UPLOAD.name: grpc.stream_unary_rpc_method_handler(
                lambda chunks, _context: (list(chunks), NO_TEXT)[1]
            ),
            methods.DOWNLOAD.name: grpc.unary_stream_rpc_method_handler(lambda _request, _context: iter([NO_TEXT])),
        }
        self._pool = concurrent.futures.ThreadPoolExecutor()
        self._server = grpc.server(self._pool)
        self._server.add_generic_rpc_handlers(
            [
                grpc.method_handlers_generic_handler(methods.COMBINER_SERVICE, handlers),
                grpc.method_handlers_generic_handler(methods.MODEL_SERVICE, garbage),
            ]
        )
        self.port = self._server.add_insecure_port("127.0.0.1:0")

    def _answer(self, name, answer, _request, context):
        codes = self._codes.get(name)
        code = codes and (codes.pop(0) if len(codes) > 1 else codes[0])
        if code:
            context.abort(grpc.StatusCode[code], "as the test has it")
        return answer

    def _poll(self, request, context):
        with self._lock:
            self.reports.extend(pb.ClientReport.FromString(request).reports)
            answer = next(self._answers)
        if isinstance(answer, grpc.StatusCode):
            context.abort(answer, "as the test has it")
        return answer

    def _tasks(self, request, context):
        self.streams += 1
        yield from self._stream if self.streams == 1 else ()

    def end_of(self, correlation_id):
        """Return the first report of a task's end; waits for it."""

        def look():
            return [report for report in self.reports if report.done and report.correlation_id == correlation_id]

        return wait_until(look, seconds=20, what=f"the end of {correlation_id}")[0]

    def __enter__(self):
        self._server.start()
        return self

    def __exit__(self, *_):
        self._server.stop(None).wait()
        self._pool.shutdown()


def connected(server):
    settings = Settings(polling_interval=POLLING, send_telemetry=False, check_version=False, report_status=False)
    client = EdgeClient(runtime=GrpcEdgeClientRuntime(settings=settings))
    client.set_client_id("c")
    client.set_custom_callback("answer", callbacks.answer)
    assert client.init_grpchandler(GrpcConnectionOptions("127.0.0.1", server.port, grpc_secure=False))
    return client


@contextlib.contextmanager
def client_of(server, **run):
    client = connected(server)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.run, **run)
        try:
            yield client
        finally:
            client._runtime.stop()
            running.result(30)


def test_a_combiner_in_trouble_and_one_that_lacks_calls_are_served_all_the_same(caplog):
    codes = {"Announce": ["INTERNAL", "UNKNOWN", "UNIMPLEMENTED"], "SendHeartbeat": ["UNIMPLEMENTED"]}
    caplog.set_level("DEBUG")
    with RawServer([directive(GOOD)], codes=codes) as server, client_of(server, with_heartbeat=True):
        assert server.end_of("good").status == "COMPLETED"
    actions = [getattr(record, "action", "") for record in caplog.records]
    assert actions.count("heartbeat_refused") == actions.count("announce_lacking") == 1
    # Those are the two greetings.
    assert actions.count("link_failed") == 2
    assert "goodbye_lost" not in actions


def test_models_that_cannot_be_read_and_answers_to_them_are_broken_transfers():
    async def scenario(port):
        calls = CombinerCalls(open_channel("127.0.0.1", port, secure=False), CallCredentials(client_id="c", name="n"))
        calls.backoff = Backoff(first=0.001)
        transfer = ModelTransfer(calls)
        try:
            with pytest.raises(ModelTransferError, match=r"arrived broken 3 times: .*cannot be read"):
                await transfer.download("m")
            with (
                ScaleoutModel.from_training_model([np.zeros(3)]) as model,
                pytest.raises(ModelTransferError, match=r"3 times: .*cannot be read"),
            ):
                await transfer.upload(model)
        finally:
            await calls.aclose()

    with RawServer([]) as server:
        asyncio.run(scenario(server.port))


def test_a_combiner_that_will_not_have_the_client_ends_its_run():
    with RawServer([], codes={"Announce": ["PERMISSION_DENIED"]}) as server:
        client = connected(server)
        with pytest.raises(CallError, match="PERMISSION_DENIED"):
            client.run()


def test_polling_survives_whatever_comes_and_serves_what_can_be_served(caplog):
    awful = [
        b"\xff" * 20,
        grpc.StatusCode.DATA_LOSS,
        directive(broken_task(), broken_task(NO_TEXT)),
        grpc.StatusCode.UNAUTHENTICATED,
        directive(field(5, b"typeless")),
        directive(field(5, b"json") + field(11, b"Custom_answer") + field(4, b"{")),
        directive(field(5, b"list") + field(11, b"Custom_answer") + field(4, b'{"parameters": [1]}')),
        directive(field(5, b"dance") + field(11, b"Scaleout_Dance")),
        directive(GOOD),
    ]
    with RawServer(awful) as server, client_of(server):
        assert server.end_of("good").status == "COMPLETED"
        for correlation_id, says in (
            ("broken", "whose data cannot be read"),
            ("typeless", "does not know tasks of type"),
            ("json", "not JSON"),
            ("list", "not an object"),
            ("dance", "does not know tasks of type"),
        ):
            end = server.end_of(correlation_id)
            assert end.status == "FAILED"
            assert says in end.response
    assert "without an id it is ignored" in caplog.text


def test_the_task_stream_survives_whatever_comes(caplog):
    tasks = [b"\xff" * 20, broken_task(), GOOD]
    with RawServer([], stream=tasks) as server, client_of(server, with_polling=False):
        wait_until(lambda: server.streams > 1, seconds=20, what="another stream")
        wait_until(lambda: "whose data cannot be read" in caplog.text, what="the unreadable task")


def test_a_bug_in_the_loop_does_not_end_it(monkeypatch, caplog):
    from scaleout_mp.supervisor.taskbook import TaskBook

    real, left = TaskBook.reports, [2]

    def reports(self, client_id):
        left[0] -= 1
        if left[0] >= 0:
            raise ZeroDivisionError
        return real(self, client_id)

    monkeypatch.setattr(TaskBook, "reports", reports)
    with RawServer([directive(GOOD)]) as server, client_of(server):
        assert server.end_of("good").status == "COMPLETED"
    assert "polling failed; trying again" in caplog.text


def raising(*_):
    raise KeyError("the column 'age' is not there")


@pytest.mark.parametrize("task_type", ["Scaleout_Validation", "Custom_broken", "Scaleout_ModelUpdate"])
def test_a_callback_that_raises_is_a_failure_with_the_last_lines_of_its_traceback(tmp_path, task_type):
    with LocalNetworkThread(tmp_path / "net") as net, RunningClient(net) as edge:
        with ScaleoutModel.from_training_model([np.zeros(10)]) as model:
            model_id = net.add_model(model)
        edge.client.set_train_callback(raising)
        edge.client.set_validate_callback(raising)
        edge.client.set_custom_callback("broken", raising)
        task = edge.issue(task_type, model_id=model_id)
        task.done(20)
        (end,) = net.events.of(TaskReported, lambda event: event.correlation_id == task.correlation_id and event.done)
    assert end.status == "FAILED"
    assert "the column 'age' is not there" in end.response["error"]
    traceback = end.response["report"]["traceback"]
    assert "in raising" in traceback
    assert traceback.splitlines()[-1].startswith("KeyError")
    assert len(traceback.splitlines()) <= 20
