"""The book of tasks that the server gave us: what is held, what is reported, what was finished before.

Pure: a clock that is given, no tasks, no network.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import logging
import time
from typing import TYPE_CHECKING, Final, Self

from scaleout_mp.supervisor.messages import AUTONOMOUS_PREFIX
from scaleout_mp.wire import edge_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

logger = logging.getLogger(__name__)

#: Finished tasks whose last report is remembered, so that a late second delivery does not run them again.
REMEMBERED: Final = 1024

#: Characters of a finished task's response that are kept to be told again.
_RESPONSE_KEPT: Final = 1 << 16
_RESPONSE_TOLD: Final = '{"msg": "the response was reported before and is too long to be kept"}'
#: Bytes of the ends in one report at most, or one end: servers take messages of 4 MiB.
REPORT_BYTES: Final = 2 << 20

#: Reports in which a task of the client's own is introduced; a server that does not name it by then never will.
INTRODUCTIONS: Final = 10

ABORTED_BY_SERVER: Final = "Aborted by server"
TIMED_OUT_BY_SERVER: Final = "Timed out by server"


class TaskStatus(enum.StrEnum):
    """The statuses of the wire that a client gives or obeys."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    INTERRUPTED = "INTERRUPTED"
    TIMEOUT = "TIMEOUT"


class Verdict(enum.Enum):
    """What a task request from the server asks for."""

    #: A task that was never seen: run it.
    START = "start"
    #: End a task that is held.
    ABORT = "abort"
    #: End a task that is held, for its time is up.
    TIME_OUT = "time_out"
    #: Nothing to do; if an answer is due, the next report has it.
    NOTHING = "nothing"


_STOPS: Final[Mapping[str, Verdict]] = {
    TaskStatus.INTERRUPTED: Verdict.ABORT,
    TaskStatus.TIMEOUT: Verdict.TIME_OUT,
}


@dataclasses.dataclass
class HeldTask:
    """A task that the server may still hear of."""

    correlation_id: str
    status: TaskStatus = TaskStatus.PENDING
    #: JSON.
    response: str = ""
    done: bool = False
    #: Seconds since the epoch; None before it was so far.
    started_at: float | None = None
    completed_at: float | None = None
    #: Of a task that the client started by itself, until the server's directive names it.
    own: OwnTask | None = None


@dataclasses.dataclass
class OwnTask:
    """What the server needs to know of a task that it did not give out."""

    command_type: str
    #: JSON.
    parameters: str
    #: In so many reports that the server accepted.
    told: int = 0

    @classmethod
    def of(cls, request: pb.TaskRequest) -> Self | None:
        """Return it for a task of the client's own; None for one of the server's."""
        if not request.type.startswith(AUTONOMOUS_PREFIX):
            return None
        return cls(command_type=request.type, parameters=request.data)


class TaskBook:
    """Every task from its delivery until its last report was accepted."""

    def __init__(
        self,
        *,
        remembered: int = REMEMBERED,
        on_told: Callable[[HeldTask], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Call `on_told` with each task whose end the server has heard of. `clock`: seconds since the epoch."""
        self._on_told = on_told
        self._clock = clock
        self._held: dict[str, HeldTask] = {}
        self._finished: collections.OrderedDict[str, HeldTask] = collections.OrderedDict()
        self._remembered = remembered

    @property
    def unfinished(self) -> int:
        """How many tasks are held that have not ended."""
        return sum(not task.done for task in self._held.values())

    @property
    def unreported(self) -> int:
        """How many ends the server has not heard of."""
        return sum(task.done for task in self._held.values())

    def status_of(self, correlation_id: str) -> TaskStatus | None:
        """Return the status of a task that is held."""
        task = self._held.get(correlation_id)
        return None if task is None else task.status

    def restore(self, request: pb.TaskRequest, status: TaskStatus, response: str) -> None:
        """Take over the end of a task of an earlier run, of which the server has not heard."""
        correlation_id = request.correlation_id
        own = OwnTask.of(request)
        self._held[correlation_id] = HeldTask(correlation_id, status=status, response=response, done=True, own=own)

    def remember(self, correlation_id: str, status: TaskStatus, response: str) -> None:
        """Take over the end of a task of an earlier run, of which the server has heard."""
        self._finished[correlation_id] = HeldTask(correlation_id, status=status, response=response, done=True)

    def receive(self, request: pb.TaskRequest) -> Verdict:
        """Take a request from a directive and say what it asks for."""
        stop = _STOPS.get(request.status)
        correlation_id = request.correlation_id
        held = self._held.get(correlation_id)
        if held is not None:
            held.own = None
            return Verdict.NOTHING if held.done or stop is None else stop
        finished = self._finished.get(correlation_id)
        if finished is not None:
            # Told already, and told the same again, also to an abort that comes too late: a task has one end.
            self._held[correlation_id] = finished
            return Verdict.NOTHING
        if stop is not None:
            reason = ABORTED_BY_SERVER if stop is Verdict.ABORT else TIMED_OUT_BY_SERVER
            self._held[correlation_id] = HeldTask(correlation_id)
            self.finish(correlation_id, TaskStatus.INTERRUPTED, f'{{"msg": "{reason}"}}')
            return Verdict.NOTHING
        self._held[correlation_id] = HeldTask(correlation_id)
        return Verdict.START

    def start(self, request: pb.TaskRequest) -> None:
        """Take a task that no directive brings; one of the client's own is introduced until the server has named it."""
        self._held[request.correlation_id] = HeldTask(request.correlation_id, own=OwnTask.of(request))

    def run(self, correlation_id: str) -> None:
        """Note that a task runs."""
        task = self._held[correlation_id]
        task.status, task.started_at = TaskStatus.RUNNING, self._clock()

    def finish(self, correlation_id: str, status: TaskStatus, response: str) -> None:
        """Note how a task ended, once: a second end raises RuntimeError."""
        task = self._held[correlation_id]
        if task.done:
            raise RuntimeError(f"task {correlation_id} ended as {task.status} and cannot end as {status}")
        task.status, task.response, task.done, task.completed_at = status, response, True, self._clock()

    def reports(self, client_id: str) -> list[pb.ActivityReport]:
        """Return a report for each task that is held.

        Ends that do not fit beside the others are told by a later report; until then their tasks count as running.
        """
        reports, left = [], REPORT_BYTES
        for task in self._held.values():
            size = len(task.response.encode())
            fits = size <= left or left == REPORT_BYTES
            left -= size if fits else 0
            reports.append(_report(client_id, task, whole=fits))
        return reports

    def accepted(self, reports: Iterable[pb.ActivityReport]) -> None:
        """Forget the tasks whose end is in reports that the server took."""
        for report in reports:
            if report.done:
                self._retire(report.correlation_id)
            elif report.command_type:
                self._introduced(report.correlation_id)

    def _introduced(self, correlation_id: str) -> None:
        task = self._held.get(correlation_id)
        if task is None or task.own is None:
            return
        task.own.told += 1
        if task.own.told >= INTRODUCTIONS:
            logger.warning(
                "the server does not take notice of task %s (%s), which this client started: it runs, and only this "
                "client can stop it",
                correlation_id,
                task.own.command_type,
                extra={"action": "task_not_adopted", "task_id": correlation_id},
            )
            task.own = None

    def drop_finished(self) -> None:
        """Forget all ends: there is nobody to report them to."""
        for correlation_id in [task.correlation_id for task in self._held.values() if task.done]:
            self._retire(correlation_id)

    def _retire(self, correlation_id: str) -> None:
        task = self._held.pop(correlation_id, None)
        if task is None:
            return
        if len(task.response) > _RESPONSE_KEPT:
            task.response = _RESPONSE_TOLD
        self._finished[correlation_id] = task
        self._finished.move_to_end(correlation_id)
        if self._on_told is not None:
            self._on_told(task)
        while len(self._finished) > self._remembered:
            self._finished.popitem(last=False)


def _report(client_id: str, task: HeldTask, *, whole: bool) -> pb.ActivityReport:
    """Return a task's report; when it is not `whole`, its end is left for a later one."""
    report = pb.ActivityReport(
        node_id=client_id,
        correlation_id=task.correlation_id,
        status=task.status if whole else TaskStatus.RUNNING,
        done=task.done and whole,
        response=task.response if whole else "",
    )
    if task.started_at is not None:
        report.started_at.FromNanoseconds(round(task.started_at * 1e9))
    if report.done and task.completed_at is not None:
        report.completed_at.FromNanoseconds(round(task.completed_at * 1e9))
    if task.own is not None:
        report.command_type = task.own.command_type
        if task.own.parameters:
            report.parameters = task.own.parameters
    return report
