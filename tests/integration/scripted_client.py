"""An edge client by hand: raw gRPC calls and a poll/report loop whose answers a test scripts."""

from __future__ import annotations

import json
import threading
import uuid

import grpc
import numpy as np

from scaleout_mp.model import ScaleoutModel
from scaleout_mp.wire import edge_pb2 as pb
from scaleout_mp.wire import methods

OPTIONS = [
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 30_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_receive_message_length", -1),
]


def weights(value: float, size: int = 4) -> list[np.ndarray]:
    return [np.full(size, value, dtype=np.float32), np.full((2, 2), value, dtype=np.float32)]


class ScriptedClient:
    """A context manager: inside, a thread polls; `train` and `validate` say what to do with a task.

    Both are called with (client, task) and return (status, response) of the done report, or None to leave the
    task running.
    """

    def __init__(
        self,
        address,
        name,
        *,
        train=None,
        validate=None,
        custom=None,
        token=None,
        interval=0.03,
        announce=True,
    ):
        self.client_id = f"id-{name}"
        self.name = name
        self.interval = interval
        self.scripts = {"Scaleout_ModelUpdate": train, "Scaleout_Validation": validate}
        self.custom = custom
        self.announce_itself = announce
        #: Reports of the tasks that are held.
        self.held: dict[str, pb.ActivityReport] = {}
        #: Every directive for a task that was held already.
        self.stops: list[pb.TaskRequest] = []
        self.tasks: list[pb.TaskRequest] = []
        self.error: BaseException | None = None
        self._token = token
        self._channel = grpc.insecure_channel(address, options=OPTIONS)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=f"client-{name}")

    def metadata(self, *more):
        basis = [("client", self.client_id), ("client-id", self.client_id), ("name", self.name)]
        if self._token is not None:
            basis.append(("authorization", f"Bearer {self._token}"))
        return [*basis, *more]

    def call(self, method, request, *more, timeout=10.0, wait_for_ready=None):
        kinds = {
            (False, False): self._channel.unary_unary,
            (False, True): self._channel.unary_stream,
            (True, False): self._channel.stream_unary,
            (True, True): self._channel.stream_stream,
        }
        make = kinds[method.stream_in, method.stream_out]
        stub = make(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )
        return stub(request, metadata=self.metadata(*more), timeout=timeout, wait_for_ready=wait_for_ready)

    def announce(self, kind, parameters=""):
        request = pb.ClientAnnounceRequest(client_id=self.client_id, type=kind, parameters=parameters)
        return self.call(methods.ANNOUNCE, request)

    def poll(self, *reports, skip=False):
        report = pb.ClientReport(client_id=self.client_id, reports=reports, skip_polling_tasks=skip)
        return list(self.call(methods.POLL_AND_REPORT, report).tasks)

    def download(self, model_id):
        call = self.call(methods.DOWNLOAD, pb.ModelRequest(model_id=model_id))
        data = b"".join(chunk.data for chunk in call)
        return data, dict(call.trailing_metadata()).get("checksum")

    def upload(self, model, *, checksum=None):
        return self.call(
            methods.UPLOAD,
            model.get_filechunk_stream(32 * 1024),
            ("model-id", model.model_id),
            ("checksum", checksum or model.checksum),
        )

    def send_update(self, task, model, *, num_examples=1, meta=None):
        return self.call(
            methods.SEND_MODEL_UPDATE,
            pb.ModelUpdate(
                client_id=self.client_id,
                model_id=task.model_id,
                model_update_id=model.model_id,
                correlation_id=task.correlation_id,
                round_id=task.round_id,
                session_id=task.session_id,
                meta=json.dumps(meta or {"training_metadata": {"num_examples": num_examples}}),
                config=task.data,
            ),
        )

    def send_validation(self, task, metrics):
        return self.call(
            methods.SEND_MODEL_VALIDATION,
            pb.ModelValidation(
                client_id=self.client_id,
                model_id=task.model_id,
                data=json.dumps(metrics),
                correlation_id=task.correlation_id,
                session_id=task.session_id,
            ),
        )

    def finish(self, correlation_id, status, response=None):
        """Let the next poll report a held task as done."""
        report = self.held[correlation_id]
        report.status = status
        report.response = json.dumps(response or {})
        report.done = True

    def __enter__(self):
        if self.announce_itself:
            self.announce("Connect")
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self._channel.close()
        if self.error is not None:
            raise self.error

    def close(self):
        """Close the channel of a client that was never entered."""
        self._channel.close()

    def vanish(self):
        """Stop to poll without a word."""
        self._stop.set()

    def _loop(self):
        try:
            while not self._stop.wait(self.interval):
                self._once()
        except BaseException as error:
            self.error = error

    def _once(self):
        sent = [pb.ActivityReport.FromString(report.SerializeToString()) for report in self.held.values()]
        directives = self.poll(*sent)
        for report in sent:
            if report.done:
                del self.held[report.correlation_id]
        for task in directives:
            if task.correlation_id in self.held:
                self.stops.append(task)
                continue
            self.tasks.append(task)
            self.held[task.correlation_id] = pb.ActivityReport(
                node_id=self.client_id, correlation_id=task.correlation_id, status="RUNNING"
            )
            script = self.scripts.get(task.type, self.custom)
            end = script(self, task) if script is not None else ("FAILED", {"error": f"no script for {task.type}"})
            if end is not None:
                self.finish(task.correlation_id, *end)


def trains_to(value, num_examples=1):
    """Return a train script whose weights are the received ones plus `value`."""

    def train(client, task):
        data, _ = client.download(task.model_id)
        current = ScaleoutModel.from_filechunk_stream([pb.FileChunk(data=data)])
        arrays = [array + np.float32(value) for array in current.get_training_model()]
        model = ScaleoutModel.from_training_model(arrays)
        assert client.upload(model).status == pb.OK
        client.send_update(task, model, num_examples=num_examples)
        return "COMPLETED", {}

    return train


def validates_as(**metrics):
    """Return a validate script that sends these metrics."""

    def validate(client, task):
        client.send_validation(task, metrics)
        return "COMPLETED", {}

    return validate


def new_id() -> str:
    return str(uuid.uuid4())
