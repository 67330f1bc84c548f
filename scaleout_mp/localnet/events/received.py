"""What clients send, as events."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar

from scaleout_mp.localnet.events.base import ClientEvent, figures


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeartbeatReceived(ClientEvent):
    """A heartbeat came."""

    quiet: ClassVar[bool] = True

    #: The client's own interval; None from one of release 1.0.
    interval_ms: int | None = None

    def __str__(self) -> str:
        return f"client {self.client_id}: heartbeat"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PollReceived(ClientEvent):
    """A client polled for tasks and reported those that it holds."""

    quiet: ClassVar[bool] = True

    #: Correlation ids of the tasks that the client holds.
    held: tuple[str, ...] = ()
    #: The client's own interval; None from one of release 1.0.
    interval_ms: int | None = None
    #: It wants no new tasks.
    skips: bool = False

    def __str__(self) -> str:
        return f"client {self.client_id}: poll, {len(self.held)} tasks held"


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateReceived(ClientEvent):
    """A client sent a model update."""

    model_id: str
    model_update_id: str
    correlation_id: str
    round_id: str
    session_id: str
    meta: Mapping[str, Any]
    config: str = ""
    #: The same update was sent before.
    repeated: bool = False

    def __str__(self) -> str:
        training = self.meta.get("training_metadata")
        examples = training.get("num_examples") if isinstance(training, Mapping) else None
        return f"update from {self.client_id} ({examples} examples)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationReceived(ClientEvent):
    """A client sent what its validation found."""

    model_id: str
    correlation_id: str
    session_id: str
    metrics: Mapping[str, Any]
    timestamp: float = 0.0

    def __str__(self) -> str:
        return f"validation by {self.client_id}: {figures(self.metrics)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricReceived(ClientEvent):
    """A client sent the metrics of one step."""

    quiet: ClassVar[bool] = True

    metrics: Mapping[str, float]
    model_id: str
    round_id: str
    session_id: str
    #: None when the client set none.
    step: int | None
    #: The client's own clock, seconds since the epoch.
    timestamp: float

    def __str__(self) -> str:
        return f"metrics from {self.client_id}, step {self.step}: {figures(self.metrics)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttributeReceived(ClientEvent):
    """A client sent attributes of itself."""

    attributes: Mapping[str, Any]
    timestamp: float
    #: Id of a streamed record; empty for a plain message.
    record_id: str = ""

    def __str__(self) -> str:
        return f"attributes of {self.client_id}: {json.dumps(dict(self.attributes))}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TelemetryReceived(ClientEvent):
    """A client sent measurements of its machine."""

    quiet: ClassVar[bool] = True

    telemetry: Mapping[str, Any]
    timestamp: float
    #: Id of a streamed record; empty for a plain message.
    record_id: str = ""

    def __str__(self) -> str:
        return f"telemetry of {self.client_id}: {figures(self.telemetry)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferenceReceived(ClientEvent):
    """A client streamed a result of inference."""

    record_id: str
    inference_id: str
    model_id: str
    key: str
    payload: Mapping[str, Any]
    timestamp: float

    def __str__(self) -> str:
        return f"inference result {self.key} from {self.client_id}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StatusReceived(ClientEvent):
    """A client sent a status message."""

    status: str
    #: NONE, INFO, DEBUG, WARNING, ERROR or AUDIT.
    level: str
    status_type: str
    timestamp: float

    @property
    def printed(self) -> bool:
        """Only what went wrong is worth a line."""
        return self.level in {"WARNING", "ERROR"}

    def __str__(self) -> str:
        return f"status of {self.client_id}: {self.level} {self.status.strip()}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BacklogReceived(ClientEvent):
    """A client said how much it has not been able to send."""

    quiet: ClassVar[bool] = True

    backlog_total: int
    dropped_total: int
    #: Milliseconds; None when nothing waits.
    oldest_age_ms: float | None

    def __str__(self) -> str:
        return f"backlog of {self.client_id}: {self.backlog_total} waiting, {self.dropped_total} dropped"
