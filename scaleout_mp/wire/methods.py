"""The call paths of the protocol, each with its message types.

The paths say `scaleout.`, which is what servers route on; the messages live in a proto package of our own (see
protos/scaleout_mp/wire/edge.proto). So no service code is generated: a call is a path, a request and a response.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from scaleout_mp.wire import edge_pb2 as pb

if TYPE_CHECKING:
    from google.protobuf.message import Message

COMBINER_SERVICE: Final = "scaleout.CombinerClient"
MODEL_SERVICE: Final = "scaleout.ModelService"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One remote call: where it is and what passes through it."""

    service: str
    name: str
    request: type[Message]
    response: type[Message]
    #: The client sends a stream of requests.
    stream_in: bool = False
    #: The server answers with a stream of responses.
    stream_out: bool = False
    #: Servers before 1.1 answer UNIMPLEMENTED.
    since_1_1: bool = False

    @property
    def path(self) -> str:
        """The full method path, as a channel wants it."""
        return f"/{self.service}/{self.name}"


def _combiner(name: str, request: type[Message], response: type[Message] = pb.Response, **flags: bool) -> Method:
    return Method(service=COMBINER_SERVICE, name=name, request=request, response=response, **flags)


SEND_MODEL_UPDATE: Final = _combiner("SendModelUpdate", pb.ModelUpdate)
SEND_MODEL_VALIDATION: Final = _combiner("SendModelValidation", pb.ModelValidation)
SEND_MODEL_METRIC: Final = _combiner("SendModelMetric", pb.ModelMetric)
SEND_ATTRIBUTE_MESSAGE: Final = _combiner("SendAttributeMessage", pb.AttributeMessage)
SEND_TELEMETRY_MESSAGE: Final = _combiner("SendTelemetryMessage", pb.TelemetryMessage)
ANNOUNCE: Final = _combiner("Announce", pb.ClientAnnounceRequest)
SEND_STATUS: Final = _combiner("SendStatus", pb.Status)
SEND_HEARTBEAT: Final = _combiner("SendHeartbeat", pb.Heartbeat)
POLL_AND_REPORT: Final = _combiner("PollAndReportAsync", pb.ClientReport, pb.CombinerDirective)
TASK_STREAM: Final = _combiner("TaskStream", pb.ClientAvailableMessage, pb.TaskRequest, stream_out=True)
SEND_BACKLOG_REPORT: Final = _combiner("SendBacklogReport", pb.BacklogReport, since_1_1=True)
STREAM_TELEMETRY_RECORD: Final = _combiner(
    "StreamTelemetryRecord", pb.TelemetryRecord, pb.RecordAck, stream_in=True, stream_out=True, since_1_1=True
)
STREAM_ATTRIBUTE_RECORD: Final = _combiner(
    "StreamAttributeRecord", pb.AttributeRecord, pb.RecordAck, stream_in=True, stream_out=True, since_1_1=True
)
STREAM_INFERENCE_RESULT: Final = _combiner(
    "StreamInferenceResult", pb.InferenceResult, pb.RecordAck, stream_in=True, stream_out=True, since_1_1=True
)
UPLOAD: Final = Method(
    service=MODEL_SERVICE, name="Upload", request=pb.FileChunk, response=pb.ModelResponse, stream_in=True
)
DOWNLOAD: Final = Method(
    service=MODEL_SERVICE, name="Download", request=pb.ModelRequest, response=pb.FileChunk, stream_out=True
)
