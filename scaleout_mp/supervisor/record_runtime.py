"""The part of GrpcEdgeClientRuntime that sends what the program logs outside any task."""

from __future__ import annotations

import abc
import time
from typing import TYPE_CHECKING, Any

from scaleout_mp.client import published
from scaleout_mp.client.values import attribute_values, inference_payload, metric_values
from scaleout_mp.task import AttributesRecord, InferenceRecord, MetricRecord, Record, RecordContext, TelemetryRecord

if TYPE_CHECKING:
    from collections.abc import Mapping


class RecordRuntime(abc.ABC):
    """Each method may be called from any thread; False, said in the log, when the client is not connected."""

    @abc.abstractmethod
    def _send(self, record: Record) -> bool: ...

    def send_metric(
        self,
        metrics: Mapping[str, float],
        model_id: str | None,
        step: int | None,
        round_id: str | None,
        session_id: str | None,
    ) -> bool:
        """Send metrics."""
        context = RecordContext(model_id=model_id, round_id=round_id, session_id=session_id)
        return self._send(MetricRecord(metrics=metrics, step=step, timestamp=time.time(), context=context))

    def send_attributes(self, attributes: Mapping[str, str], priority: str | None = None) -> bool:
        """Send attributes."""
        del priority
        attributes = attribute_values(attributes)
        return self._send(AttributesRecord(attributes=attributes, timestamp=time.time()))

    def send_telemetry(
        self,
        telemetry: Mapping[str, float] | None = None,
        *,
        key: str | None = None,
        payload: Mapping[str, Any] | None = None,
        priority: str | None = None,
    ) -> bool:
        """Send telemetry, in the form of either release."""
        del priority
        telemetry = metric_values(published.telemetry_values(key, payload, telemetry), what="telemetry value")
        return self._send(TelemetryRecord(telemetry=telemetry, timestamp=time.time()))

    def send_inference_result(
        self,
        key: str,
        payload: Mapping[str, Any] | str,
        inference_id: str,
        model_id: str,
        priority: str | None = None,
    ) -> bool:
        """Send a result of an inference."""
        del priority
        text = payload if isinstance(payload, str) else inference_payload(payload)
        ids = {"inference_id": inference_id, "model_id": model_id}
        return self._send(InferenceRecord(key=key, payload=text, timestamp=time.time(), **ids))
