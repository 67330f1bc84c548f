"""What the network heard, put in order: rounds, ends of tasks, and a line for each thing worth telling."""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.localnet.events import (
    ClientConnected,
    ClientDisconnected,
    ClientEvent,
    Event,
    MetricReceived,
    RoundFinished,
    RoundStarted,
    SessionFinished,
    StatusReceived,
    TaskIssued,
    TaskReported,
    UpdateReceived,
    UpdateRejected,
    ValidationReceived,
)
from scaleout_mp.supervisor.taskbook import TIMED_OUT_BY_SERVER
from scaleout_mp.task import EndReason

if TYPE_CHECKING:
    from collections.abc import Mapping

TRAINING: Final = "Scaleout_ModelUpdate"


class Tone(enum.Enum):
    """How a line is to be taken."""

    PLAIN = "plain"
    GOOD = "good"
    BAD = "bad"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """Something to tell."""

    text: str
    tone: Tone = Tone.PLAIN


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskEnd:
    """The terminal report of one task, as it came over the network."""

    correlation_id: str
    client: str
    #: 1 for the first round; 0 when the network never issued the task.
    round: int
    task_type: str
    #: COMPLETED, FAILED, INTERRUPTED.
    status: str
    reason: str
    #: What happened, in one line.
    explanation: str
    #: The client's ExitReport, as far as the report carried it.
    report: Mapping[str, Any]
    #: Step of the last metric that arrived from that client in that round, before the report.
    last_step: int | None = None

    @property
    def completed(self) -> bool:
        """Whether the client did the task."""
        return self.status == "COMPLETED"


@dataclasses.dataclass(kw_only=True)
class ClientRecord:
    """What one client has done so far."""

    name: str
    connected: bool = False
    #: Whether it was connected and went.
    gone: bool = False
    updates: int = 0
    metrics: int = 0
    #: Its own validation of the last model that it was asked about.
    accuracy: float | None = None
    last_failure: TaskEnd | None = None


class Ledger:
    """Takes the network's events in their order. Use it in one thread."""

    def __init__(self, *, rounds: int) -> None:
        self.rounds = rounds
        self.clients: dict[str, ClientRecord] = {}
        #: The round that runs, or ran last; 0 before the first.
        self.round = 0
        self.phase = "waiting for clients"
        #: The first terminal report of each task, by correlation id.
        self.ends: dict[str, TaskEnd] = {}
        #: Terminal reports that say something else than the first one of the same task.
        self.contradictions: list[TaskEnd] = []
        self._round_numbers: dict[str, int] = {}
        self._issued: dict[str, int] = {}
        self._statuses: dict[str, str] = {}
        self._steps: dict[tuple[str, int], int] = {}

    @property
    def failures(self) -> list[TaskEnd]:
        """Every task that did not complete, in the order in which the reports came."""
        return [end for end in self.ends.values() if not end.completed]

    @property
    def unreported(self) -> list[str]:
        """Correlation ids of the tasks that were issued and whose end was not reported."""
        return [correlation_id for correlation_id in self._issued if correlation_id not in self.ends]

    def client(self, name: str) -> ClientRecord:
        """Return a client's record."""
        return self.clients.setdefault(name, ClientRecord(name=name))

    def take(self, event: Event) -> Line | None:
        """Note an event; return what there is to tell about it."""
        match event:
            case RoundStarted():
                return self._take_round(event)
            case RoundFinished() if event.status != "FINISHED":
                return Line(text=f"round {event.number} {event.status.lower()}", tone=Tone.BAD)
            case SessionFinished():
                self.phase = event.status.lower()
            case ClientEvent():
                return self._take_client_event(event)
            case _:
                pass
        return None

    def _take_client_event(self, event: ClientEvent) -> Line | None:
        match event:
            case ClientConnected():
                record = self.client(event.client_id)
                record.connected, record.gone = True, False
                return Line(text=f"{event.name} connected")
            case ClientDisconnected():
                record = self.client(event.client_id)
                record.connected, record.gone = False, True
                return Line(text=f"{event.name} {'was lost' if event.lost else 'said goodbye'}")
            case UpdateRejected():
                return Line(text=f"update from {event.client_id} left out: {event.reason}", tone=Tone.BAD)
            case TaskReported() if event.done:
                return self._take_end(event)
            case TaskIssued():
                self._issued[event.correlation_id] = self._round_numbers.get(event.round_id, 0)
                self.phase = "training" if event.task_type == TRAINING else "validation"
            case StatusReceived() if event.level in {"WARNING", "ERROR"}:
                self._statuses[event.client_id] = event.status
            case UpdateReceived() | MetricReceived() | ValidationReceived():
                self._count(event)
            case _:
                pass
        return None

    def _take_round(self, event: RoundStarted) -> Line:
        self.round, self.phase = event.number, "training"
        self._round_numbers[event.round_id] = event.number
        again = f", attempt {event.attempt}" if event.attempt > 1 else ""
        return Line(text=f"round {event.number} of {self.rounds} started on {len(event.clients)} clients{again}")

    def _count(self, event: UpdateReceived | MetricReceived | ValidationReceived) -> None:
        record = self.client(event.client_id)
        if isinstance(event, UpdateReceived):
            record.updates += not event.repeated
        elif isinstance(event, MetricReceived):
            record.metrics += 1
            if event.step is not None:
                self._steps[event.client_id, self._round_numbers.get(event.round_id, 0)] = event.step
        elif isinstance(event.metrics.get("accuracy"), float):
            record.accuracy = event.metrics["accuracy"]

    def _take_end(self, event: TaskReported) -> Line | None:
        # The client's last word of trouble comes right before the report of the task's end, for a task that was
        # interrupted it is the only one that says how the end went.
        trouble = "" if event.status == "COMPLETED" else self._statuses.pop(event.client_id, "")
        number = self._issued.get(event.correlation_id, 0)
        step = self._steps.get((event.client_id, number)) if event.task_type == TRAINING else None
        end = _read_end(event, number, trouble, step)
        first = self.ends.setdefault(event.correlation_id, end)
        if first is not end:
            # A report is repeated until the network's answer arrives.
            if (first.status, first.reason) != (end.status, end.reason):
                self.contradictions.append(end)
            return None
        if end.completed:
            return None
        self.client(end.client).last_failure = end
        return Line(text=f"{end.client}, round {end.round}: {end.explanation}", tone=Tone.BAD)


def _read_end(event: TaskReported, number: int, trouble: str, step: int | None) -> TaskEnd:
    response = event.response
    reason = "" if event.status != "COMPLETED" else EndReason.COMPLETED.value
    said = response.get("msg", "")
    if event.status == "INTERRUPTED":
        timed_out = said == TIMED_OUT_BY_SERVER
        reason = EndReason.TIMED_OUT_BY_SERVER if timed_out else EndReason.INTERRUPTED_BY_SERVER
    report = response.get("report")
    return TaskEnd(
        correlation_id=event.correlation_id,
        client=event.client_id,
        round=number,
        task_type=event.task_type,
        status=event.status,
        reason=str(response.get("reason", reason)),
        explanation=_explain(str(response.get("error") or _what_happened(trouble) or said or event.status)),
        report=report if isinstance(report, dict) else {},
        last_step=step,
    )


def _what_happened(status: str) -> str:
    """Return the middle of "task NAME: what happened (see PAGE)"."""
    _, _, message = status.partition(": ")
    return message.partition(" (see ")[0]


def _explain(text: str) -> str:
    return " ".join(text.split())
