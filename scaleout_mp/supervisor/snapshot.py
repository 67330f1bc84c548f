"""What a live view shows of a client."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from scaleout_mp.transport.link_quality import LinkState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scaleout_mp.supervisor.jobs import Job


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
    tasks: tuple[TaskSnapshot, ...] = ()


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
        process_state=None if execution is None else execution.state.value,
        memory_now=0 if execution is None else execution.memory_now,
        memory_peak=0 if execution is None else execution.memory_peak,
        memory_limit=None if execution is None else execution.memory_limit,
        moved=None if progress is None else progress.done,
        to_move=None if progress is None else progress.total,
        last_metrics={} if metric is None else metric.metrics,
        last_step=None if metric is None else metric.step,
    )
