"""The wire's messages, made from what the supervisor knows."""

from __future__ import annotations

import datetime as dt
import enum
import json
import uuid
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.timestamp_pb2 import Timestamp

from scaleout_mp.errors import ConfigError
from scaleout_mp.task import AttributesRecord, InferenceRecord, MetricRecord, Record, TelemetryRecord
from scaleout_mp.transport.message import MessageKind
from scaleout_mp.wire import edge_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Mapping

    from google.protobuf.message import Message

    from scaleout_mp.task import ExitReport, RecordContext

#: Lines of a traceback, and characters of each output stream, that go to the server.
_TRACEBACK_LINES: Final = 20
_OUTPUT_TAIL: Final = 2_000
#: Characters of any other text that goes to the server; a report must not outgrow what servers take.
_MAX_TEXT: Final = 16_000
_MAX_LINE: Final = 2_000


class TaskType(enum.StrEnum):
    """The task types that this client takes; custom ones are `CUSTOM_PREFIX` and a name."""

    MODEL_UPDATE = "Scaleout_ModelUpdate"
    VALIDATION = "Scaleout_Validation"
    RESTART = "Scaleout_RestartClient"
    STAGE_MODEL = "Scaleout_StageModel"
    INFERENCE = "Scaleout_Inference"


CUSTOM_PREFIX: Final = "Custom_"
#: Of tasks that the client starts by itself.
AUTONOMOUS_PREFIX: Final = "Autonomous_"

#: The `type` of status messages, by task type; all others go under their own name.
_STATUS_TYPES: Final = {TaskType.MODEL_UPDATE: "MODEL_UPDATE", TaskType.VALIDATION: "MODEL_VALIDATION"}


def status_type(task_type: str) -> str:
    """Return the `type` under which the status messages of a task go."""
    return next((value for key, value in _STATUS_TYPES.items() if key == task_type), task_type)


class Moments:
    """Time stamps that grow from record to record, by a microsecond at least.

    So no two messages of a task are the same, one that arrives twice can be told, and so can their order.
    """

    def __init__(self) -> None:
        self._last = -1

    def of(self, timestamp: float) -> Timestamp:
        """Return seconds since the epoch as a message has them."""
        self._last = max(round(timestamp * 1e6), self._last + 1)
        seconds, micros = divmod(self._last, 1_000_000)
        return Timestamp(seconds=seconds, nanos=micros * 1_000)


def now() -> dt.datetime:
    """Return the present as what protobuf takes for a Timestamp."""
    return dt.datetime.now(tz=dt.UTC)


def status(client_id: str, text: str, *, level: pb.LogLevel, type_: str) -> pb.Status:
    """Return a status message."""
    return pb.Status(client_id=client_id, status=text[:_MAX_TEXT], log_level=level, timestamp=now(), type=type_)


def record_message(
    client_id: str, record: Record, moments: Moments, *, task: pb.TaskRequest | None = None
) -> tuple[MessageKind, Message] | None:
    """Return kind and message for what a task logged; None for what does not go to the server.

    The ids of a metric that was logged without a context come from the task's request.
    """
    if isinstance(record, MetricRecord):
        return MessageKind.METRIC, metric(client_id, record, moments, task)
    if isinstance(record, AttributesRecord):
        attributes = [pb.AttributeElem(key=key, value=value) for key, value in record.attributes.items()]
        return MessageKind.ATTRIBUTES, pb.AttributeMessage(
            client_id=client_id, attributes=attributes, timestamp=moments.of(record.timestamp)
        )
    if isinstance(record, TelemetryRecord):
        values = [pb.TelemetryElem(key=key, value=value) for key, value in record.telemetry.items()]
        return MessageKind.TELEMETRY, pb.TelemetryMessage(
            client_id=client_id, telemetries=values, timestamp=moments.of(record.timestamp)
        )
    if isinstance(record, InferenceRecord):
        return MessageKind.INFERENCE_RESULT, pb.InferenceResult(
            inference_result_id=str(uuid.uuid4()),
            node_id=client_id,
            timestamp=moments.of(record.timestamp),
            key=record.key,
            payload=record.payload,
            inference_id=record.inference_id,
            model_id=record.model_id,
        )
    return None


def metric(client_id: str, record: MetricRecord, moments: Moments, task: pb.TaskRequest | None) -> pb.ModelMetric:
    """Return the message for one step's metrics."""
    message = pb.ModelMetric(
        client_id=client_id,
        metrics=[pb.MetricElem(key=key, value=value) for key, value in record.metrics.items()],
        timestamp=moments.of(record.timestamp),
        model_id=_id("model_id", record.context, task),
        round_id=_id("round_id", record.context, task),
        session_id=_id("session_id", record.context, task),
    )
    if record.step is not None:
        message.step.value = record.step
    return message


def _id(field: str, context: RecordContext | None, task: pb.TaskRequest | None) -> str:
    # A context of the user's own is whole: what it leaves out is left out, as the published client does.
    source = task if context is None else context
    return str(getattr(source, field, None) or "")


def task_data(request: pb.TaskRequest, field: str) -> dict[str, Any]:
    """Return an object out of the request's JSON; empty when the request has none.

    Raises ConfigError in one line when the server sent something else.
    """
    if not request.data:
        return {}
    try:
        data = json.loads(request.data)
    except ValueError as error:
        raise ConfigError(f"the server sent task data that is not JSON: {error}") from error
    found = data.get(field) if isinstance(data, dict) else data
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"the server sent task data whose {field} is {type(found).__name__}, not an object")
    return found


def compact_report(report: ExitReport) -> dict[str, Any]:
    """Return the report as the server gets it: what is known, with long texts cut to their ends."""
    fields = report.to_dict()
    if report.traceback:
        fields["traceback"] = "\n".join(report.traceback.rstrip().splitlines()[-_TRACEBACK_LINES:])
    for stream in ("stdout_tail", "stderr_tail"):
        fields[stream] = fields[stream][-_OUTPUT_TAIL:]
    cut = {key: value[-_MAX_TEXT:] if isinstance(value, str) else value for key, value in fields.items()}
    return {key: value for key, value in cut.items() if value not in (None, "", [])}


def failure_response(error: str, *, reason: str, report: ExitReport | None = None) -> dict[str, Any]:
    """Return the `response` of a FAILED report."""
    response: dict[str, Any] = {"error": " ".join(error.split())[:_MAX_LINE], "reason": reason}
    if report is not None:
        response["report"] = compact_report(report)
    return response


def interruption_response(reason: str, *, report: ExitReport | None = None) -> dict[str, Any]:
    """Return the `response` of an INTERRUPTED report; with what became of the task's process, if it had one."""
    response: dict[str, Any] = {"msg": reason}
    if report is not None:
        response |= {"reason": report.reason.value, "report": compact_report(report)}
    return response


def as_json(response: Mapping[str, Any] | Any) -> str:
    """Return a report's `response`; nothing is the empty string."""
    return "" if response is None or response == {} else json.dumps(response)
