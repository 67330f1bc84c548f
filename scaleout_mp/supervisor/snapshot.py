"""What a live view shows of a client."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import TYPE_CHECKING, Final

from scaleout_mp.transport.link_quality import LinkState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scaleout_mp.supervisor.endings import Ending
    from scaleout_mp.supervisor.jobs import Job

_MAX_LINE: Final = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSnapshot:
    """One task at one moment."""

    correlation_id: str
    type: str
    model_id: str
    round_id: str
    session_id: str
    #: pending, downloading, running, uploading or reporting.
    phase: str
    #: Since it came.
    seconds: float = 0.0
    #: State of the process; None while there is none.
    process_state: str | None = None
    #: Bytes that the task has made its own, now and at most.
    memory_now: int = 0
    memory_peak: int = 0
    #: Bytes; None: no limit.
    memory_limit: int | None = None
    #: Bytes of the model that have come or gone, while it is downloading or uploading, and of how many; None: unknown.
    moved: int | None = None
    to_move: int | None = None
    last_metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    last_step: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Death:
    """How a task ended that did not complete."""

    task: str
    type: str
    #: For programs, as the report to the server says it: crashed, memory_limit, failed and so on.
    reason: str
    #: One line.
    message: str
    #: Seconds since the epoch.
    at: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientSnapshot:
    """A client at one moment."""

    name: str
    client_id: str
    #: Whether the combiner answered the last call.
    connected: bool
    #: Messages that wait for the combiner.
    pending_messages: int
    link: LinkState = LinkState.HEALTHY
    #: Seconds, median of the last; None before there was one.
    round_trip: float | None = None
    #: Records for which there was no room, and messages that the combiner does not want, since the start.
    dropped_messages: int = 0
    refused_messages: int = 0
    tasks: tuple[TaskSnapshot, ...] = ()
    #: The last ones, the latest last.
    deaths: tuple[Death, ...] = ()


def task_snapshot(job: Job) -> TaskSnapshot:
    """Return what is to be seen of a job."""
    request, execution, metric, progress = job.request, job.execution, job.last_metric, job.progress
    return TaskSnapshot(
        correlation_id=request.correlation_id,
        type=request.type,
        model_id=request.model_id,
        round_id=request.round_id,
        session_id=request.session_id,
        phase=job.phase.value,
        seconds=time.monotonic() - job.came_at,
        process_state=None if execution is None else execution.state.value,
        memory_now=0 if execution is None else execution.memory_now,
        memory_peak=0 if execution is None else execution.memory_peak,
        memory_limit=None if execution is None else execution.memory_limit,
        moved=None if progress is None else progress.done,
        to_move=None if progress is None else progress.total,
        last_metrics={} if metric is None else metric.metrics,
        last_step=None if metric is None else metric.step,
    )


def death(job: Job, ending: Ending) -> Death:
    """Return how a job ended that did not complete."""
    response = json.loads(ending.response) if ending.response else {}
    said = response.get("error") or response.get("msg") or ending.status.value
    return Death(
        task=job.correlation_id,
        type=job.request.type,
        reason=str(response.get("reason") or ending.status.value.lower()),
        message=(ending.line or said)[:_MAX_LINE],
        at=time.time(),
    )
