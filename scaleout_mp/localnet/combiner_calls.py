"""What the combiner does with each call of CombinerClient."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from scaleout_mp.localnet.events import (
    AttributeReceived,
    BacklogReceived,
    HeartbeatReceived,
    InferenceReceived,
    MetricReceived,
    PollReceived,
    StatusReceived,
    TelemetryReceived,
    UpdateReceived,
    ValidationReceived,
    VersionChecked,
)
from scaleout_mp.localnet.tasks import parse_object
from scaleout_mp.wire import edge_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection

    from google.protobuf.timestamp_pb2 import Timestamp

    from scaleout_mp.localnet.combiner import Call
    from scaleout_mp.localnet.parts import NetworkParts, Release


def _seconds(timestamp: Timestamp) -> float:
    return timestamp.seconds + timestamp.nanos / 1e9


def _require_object(text: str, field: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{field} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{field} must be a JSON object, not {type(value).__name__}")  # noqa: TRY004 - an answer
    return value


def _keyed(key: str, payload: str) -> dict[str, Any]:
    """Return a streamed record as a message would have said it: a bare scalar travels as {"value": x}."""
    value = parse_object(payload)
    if not key:
        return value
    return {key: value["value"] if value.keys() == {"value"} else value}


def _as_1_0(report: pb.ClientReport) -> pb.ClientReport:
    """Return a report as a server of that release reads it: without the fields that it does not know."""
    known = pb.ClientReport(client_id=report.client_id)
    for activity in report.reports:
        known.reports.add(
            node_id=activity.node_id,
            correlation_id=activity.correlation_id,
            status=activity.status,
            done=activity.done,
            response=activity.response,
        )
    return known


class CombinerCalls:
    """Behaviour of the calls of CombinerClient.

    A ValueError is answered as INVALID_ARGUMENT, a PermissionError as PERMISSION_DENIED.
    """

    def __init__(
        self, parts: NetworkParts, *, accepted_versions: Collection[str] | None, release: Release = "1.1"
    ) -> None:
        self._parts = parts
        self._release = release
        self._accepted_versions = accepted_versions

    async def announce(self, request: pb.ClientAnnounceRequest, call: Call) -> pb.Response:
        """Take a greeting or a goodbye, or say whether a version is accepted."""
        if request.type == "Connect":
            self._parts.registry.connect(request.client_id, name=call.name)
        elif request.type == "Disconnect":
            self._parts.registry.disconnect(request.client_id)
        elif request.type == "VersionCheck":
            return self._check_version(request)
        else:
            raise ValueError(f"unknown announcement {request.type!r}")
        return pb.Response(response="OK")

    def _check_version(self, request: pb.ClientAnnounceRequest) -> pb.Response:
        from scaleout_mp.config.settings import PROTOCOL_VERSION

        version = str(parse_object(request.parameters).get("client-version", ""))
        accepted = self._accepted_versions is None or version in self._accepted_versions
        self._parts.log.emit(VersionChecked(client_id=request.client_id, client_version=version, accepted=accepted))
        message = "" if accepted else f"accepted: {', '.join(sorted(self._accepted_versions or ()))}"
        parameters = {"success": accepted, "version": PROTOCOL_VERSION}
        return pb.Response(response=message, parameters=json.dumps(parameters))

    async def poll_and_report(self, report: pb.ClientReport, call: Call) -> pb.CombinerDirective:
        """Take activity reports and hand out tasks and stops."""
        client_id = report.client_id or call.client_id
        if not client_id:
            raise ValueError("client_id is missing")
        if self._release == "1.0":
            report = _as_1_0(report)
        takes_tasks = self._parts.registry.polls(client_id, name=call.name)
        held = tuple(activity.correlation_id for activity in report.reports)
        interval = report.poll_interval_ms if report.HasField("poll_interval_ms") else None
        self._parts.log.emit(
            PollReceived(client_id=client_id, held=held, interval_ms=interval, skips=report.skip_polling_tasks)
        )
        deliver = takes_tasks and not report.skip_polling_tasks
        return pb.CombinerDirective(tasks=self._parts.book.poll(client_id, report.reports, deliver=deliver))

    async def task_stream(self, request: pb.ClientAvailableMessage, call: Call) -> AsyncIterator[pb.TaskRequest]:
        """Send tasks as they are issued, for as long as the client listens."""
        client_id = request.client_id or call.client_id
        registry = self._parts.registry
        while True:
            # The open stream is the sign of life; gRPC's own pings end it when the peer is dead.
            registry.connect(client_id, name=call.name)
            try:
                async with asyncio.timeout(registry.lost_after / 3):
                    task = await self._parts.book.next_streamed(client_id)
            except TimeoutError:
                continue
            yield task

    async def send_heartbeat(self, request: pb.Heartbeat, call: Call) -> pb.Response:
        """Note a sign of life."""
        interval = request.heartbeat_interval_ms if request.HasField("heartbeat_interval_ms") else None
        self._parts.log.emit(HeartbeatReceived(client_id=request.client_id or call.client_id, interval_ms=interval))
        return pb.Response(response="OK")

    async def send_status(self, request: pb.Status, _call: Call) -> pb.Response:
        """Record a status message."""
        self._parts.log.emit(
            StatusReceived(
                client_id=request.client_id,
                status=request.status,
                level=pb.LogLevel.Name(request.log_level),
                status_type=request.type,
                timestamp=_seconds(request.timestamp),
            )
        )
        return pb.Response(response="OK")

    async def send_model_update(self, request: pb.ModelUpdate, _call: Call) -> pb.Response:
        """Give an update to its task."""
        meta = _require_object(request.meta, "meta")
        if not self._parts.models.has(request.model_update_id):
            raise ValueError(f"model {request.model_update_id} was not uploaded")
        task = self._parts.book.get(request.correlation_id)
        if task is not None and task.client_id != request.client_id:
            raise PermissionError(f"task {request.correlation_id} is another client's")
        event = UpdateReceived(
            client_id=request.client_id,
            model_id=request.model_id,
            model_update_id=request.model_update_id,
            correlation_id=request.correlation_id,
            round_id=request.round_id,
            session_id=request.session_id,
            meta=meta,
            config=request.config,
            repeated=task is not None and task.update.done(),
        )
        self._parts.log.emit(event)
        taken = self._parts.book.take_update(event)
        # Of no use: too late, or a second model for the same task.
        if taken is not None and (taken.closed or taken.update.result().model_update_id != event.model_update_id):
            await asyncio.to_thread(self._parts.models.remove, event.model_update_id)
        return pb.Response(response="OK")

    async def send_model_validation(self, request: pb.ModelValidation, _call: Call) -> pb.Response:
        """Give a validation to its task."""
        event = ValidationReceived(
            client_id=request.client_id,
            model_id=request.model_id,
            correlation_id=request.correlation_id,
            session_id=request.session_id,
            metrics=_require_object(request.data, "data"),
            timestamp=_seconds(request.timestamp),
        )
        self._parts.log.emit(event)
        self._parts.book.take_validation(event)
        return pb.Response(response="OK")

    async def send_model_metric(self, request: pb.ModelMetric, _call: Call) -> pb.Response:
        """Record metrics."""
        self._parts.log.emit(
            MetricReceived(
                client_id=request.client_id,
                metrics={element.key: element.value for element in request.metrics},
                model_id=request.model_id,
                round_id=request.round_id,
                session_id=request.session_id,
                step=request.step.value if request.HasField("step") else None,
                timestamp=_seconds(request.timestamp),
            )
        )
        return pb.Response(response="OK")

    async def send_attribute_message(self, request: pb.AttributeMessage, _call: Call) -> pb.Response:
        """Record attributes."""
        self._parts.log.emit(
            AttributeReceived(
                client_id=request.client_id,
                attributes={element.key: element.value for element in request.attributes},
                timestamp=_seconds(request.timestamp),
            )
        )
        return pb.Response(response="OK")

    async def send_telemetry_message(self, request: pb.TelemetryMessage, _call: Call) -> pb.Response:
        """Record telemetry."""
        self._parts.log.emit(
            TelemetryReceived(
                client_id=request.client_id,
                telemetry={element.key: element.value for element in request.telemetries},
                timestamp=_seconds(request.timestamp),
                record_id=request.record_id,
            )
        )
        return pb.Response(response="OK")

    async def send_backlog_report(self, request: pb.BacklogReport, _call: Call) -> pb.Response:
        """Record how much a client has not been able to send."""
        has_age = request.HasField("backlog_oldest_age_ms")
        self._parts.log.emit(
            BacklogReceived(
                client_id=request.client_id,
                backlog_total=request.backlog_total,
                dropped_total=request.backlog_dropped_total,
                oldest_age_ms=request.backlog_oldest_age_ms if has_age else None,
            )
        )
        return pb.Response(response="OK")

    async def stream_telemetry_record(
        self, records: AsyncIterator[pb.TelemetryRecord], _call: Call
    ) -> AsyncIterator[pb.RecordAck]:
        """Record and acknowledge telemetry, one by one."""
        async for record in records:
            self._parts.log.emit(
                TelemetryReceived(
                    client_id=record.client_id,
                    telemetry=_keyed(record.key, record.payload),
                    timestamp=_seconds(record.timestamp),
                    record_id=record.telemetry_id,
                )
            )
            yield pb.RecordAck(record_ids=[record.telemetry_id])

    async def stream_attribute_record(
        self, records: AsyncIterator[pb.AttributeRecord], _call: Call
    ) -> AsyncIterator[pb.RecordAck]:
        """Record and acknowledge attributes, one by one."""
        async for record in records:
            self._parts.log.emit(
                AttributeReceived(
                    client_id=record.client_id,
                    attributes=_keyed(record.key, record.payload),
                    timestamp=_seconds(record.timestamp),
                    record_id=record.attribute_id,
                )
            )
            yield pb.RecordAck(record_ids=[record.attribute_id])

    async def stream_inference_result(
        self, records: AsyncIterator[pb.InferenceResult], _call: Call
    ) -> AsyncIterator[pb.RecordAck]:
        """Record and acknowledge results of inference, one by one."""
        async for record in records:
            self._parts.log.emit(
                InferenceReceived(
                    client_id=record.node_id,
                    record_id=record.inference_result_id,
                    inference_id=record.inference_id,
                    model_id=record.model_id,
                    key=record.key,
                    payload=parse_object(record.payload),
                    timestamp=_seconds(record.timestamp),
                )
            )
            yield pb.RecordAck(record_ids=[record.inference_result_id])
