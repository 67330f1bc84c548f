"""The life of clients, tasks, models, rounds and sessions, as events."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from scaleout_mp.localnet.events.base import ClientEvent, Event, TaskEvent, figures

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientAssigned(ClientEvent):
    """The REST API gave a client its combiner."""

    name: str
    client_version: str

    def __str__(self) -> str:
        return f"client {self.name} assigned (version {self.client_version or 'unknown'})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientRefused(Event):
    """The REST API sent a client away."""

    name: str
    http_status: int
    reason: str

    def __str__(self) -> str:
        return f"client {self.name or '(no name)'} refused: {self.reason}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientEnrolled(ClientEvent):
    """Somebody with an enrollment token became a client."""

    name: str

    def __str__(self) -> str:
        return f"client {self.name} enrolled as {self.client_id}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRefreshed(ClientEvent):
    """A refresh token was exchanged; the client id is empty when the token is not one client's own."""

    quiet: ClassVar[bool] = True

    #: Whether it was replaced.
    rotated: bool

    def __str__(self) -> str:
        return f"token of {self.client_id or 'a client'} refreshed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRefused(Event):
    """A refresh or enrollment token was not taken."""

    reason: str

    def __str__(self) -> str:
        return f"token refused: {self.reason}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VersionChecked(ClientEvent):
    """A client asked whether its version is accepted."""

    quiet: ClassVar[bool] = True

    client_version: str
    accepted: bool

    def __str__(self) -> str:
        return f"client {self.client_id}: version {self.client_version} {'accepted' if self.accepted else 'refused'}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientConnected(ClientEvent):
    """A client announced itself, or polled for the first time."""

    name: str

    def __str__(self) -> str:
        return f"client {self.name} connected"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientDisconnected(ClientEvent):
    """A client announced its end, or was not heard of for too long."""

    name: str
    #: True: it vanished. False: it said goodbye.
    lost: bool

    def __str__(self) -> str:
        return f"client {self.name} {'lost' if self.lost else 'disconnected'}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskIssued(TaskEvent):
    """The network has a task for a client."""

    model_id: str
    session_id: str
    round_id: str

    def __str__(self) -> str:
        return f"{self.label} issued to {self.client_id}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskDelivered(TaskEvent):
    """A task went out to its client."""

    quiet: ClassVar[bool] = True

    #: 1 for the first delivery.
    delivery: int

    def __str__(self) -> str:
        return f"{self.label} delivered to {self.client_id} (delivery {self.delivery})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskReported(TaskEvent):
    """A client reported on a task: one event per activity report, repeated reports included."""

    status: str
    done: bool
    #: The report's response; {} when it was empty.
    response: Mapping[str, Any]
    #: False: the network never issued such a task.
    known: bool = True

    @property
    def printed(self) -> bool:
        """Only the end of a task is worth a line."""
        return self.done

    def __str__(self) -> str:
        reason = self.response.get("error") or self.response.get("msg")
        return f"{self.label} of {self.client_id}: {self.status}{f', {reason}' if reason else ''}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskEnded(TaskEvent):
    """A task is over for the network, exactly once: by its report, or because no report will come."""

    status: str
    #: Why, when it was not the client that said so; else empty.
    reason: str = ""

    @property
    def printed(self) -> bool:
        """A reported end has its line already."""
        return bool(self.reason)

    def __str__(self) -> str:
        return f"{self.label} of {self.client_id}: {self.status}, {self.reason}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskInterrupted(TaskEvent):
    """The network asked a client to stop a task."""

    #: INTERRUPTED or TIMEOUT.
    status: str

    def __str__(self) -> str:
        return f"{self.label} of {self.client_id}: asked to stop ({self.status})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelUploaded(ClientEvent):
    """A client uploaded a model, or failed to."""

    model_id: str
    #: Bytes received.
    size: int
    accepted: bool
    #: What was answered.
    message: str

    @property
    def printed(self) -> bool:
        """Only a refusal is worth a line."""
        return not self.accepted

    def __str__(self) -> str:
        state = "accepted" if self.accepted else f"refused: {self.message}"
        return f"upload of {self.model_id} by {self.client_id}, {self.size:,} bytes: {state}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDownloaded(ClientEvent):
    """A model was streamed to a client, whole."""

    quiet: ClassVar[bool] = True

    model_id: str
    size: int

    def __str__(self) -> str:
        return f"download of {self.model_id} by {self.client_id}, {self.size:,} bytes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SessionStarted(Event):
    """A session began."""

    session_id: str
    rounds: int
    model_id: str

    def __str__(self) -> str:
        return f"session {self.session_id} started: {self.rounds} rounds"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundStarted(Event):
    """A round began."""

    session_id: str
    round_id: str
    #: 1 for the first round of the session.
    number: int
    attempt: int
    model_id: str
    clients: tuple[str, ...]

    def __str__(self) -> str:
        again = f" (attempt {self.attempt})" if self.attempt > 1 else ""
        return f"round {self.number}{again} started with {len(self.clients)} clients"


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateRejected(ClientEvent):
    """An update came but does not count."""

    correlation_id: str
    reason: str

    def __str__(self) -> str:
        return f"update from {self.client_id} left out: {self.reason}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundFinished(Event):
    """A round is over, validation included."""

    session_id: str
    round_id: str
    number: int
    #: FINISHED, FAILED or ABORTED.
    status: str
    #: The new global model; empty when the round made none.
    model_id: str
    updates: int
    #: Mean over the clients that validated.
    metrics: Mapping[str, float]
    seconds: float

    def __str__(self) -> str:
        found = f", {figures(self.metrics)}" if self.metrics else ""
        return f"round {self.number} {self.status.lower()}: {self.updates} updates in {self.seconds:.1f} s{found}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SessionFinished(Event):
    """A session is over."""

    session_id: str
    #: FINISHED, FAILED or ABORTED.
    status: str
    #: The last global model.
    model_id: str
    #: Why it did not finish; else empty.
    reason: str = ""

    def __str__(self) -> str:
        return f"session {self.session_id} {self.status.lower()}{f': {self.reason}' if self.reason else ''}"
