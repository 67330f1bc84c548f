"""The book of issued tasks: queued, then delivered, then ended, each exactly once."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import enum
import json
import time
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.errors import LocalNetworkError
from scaleout_mp.localnet.events import (
    TaskDelivered,
    TaskEnded,
    TaskInterrupted,
    TaskIssued,
    TaskReported,
    UpdateReceived,
    ValidationReceived,
)
from scaleout_mp.wire import edge_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from scaleout_mp.localnet.event_log import EventLog

MODEL_UPDATE: Final = "Scaleout_ModelUpdate"
VALIDATION: Final = "Scaleout_Validation"

#: How often a task is handed out to a client that never mentions it: an answer to a poll may get lost on its way.
MAX_DELIVERIES: Final = 3
#: Ended tasks that are still known by their id, so that a repeated report finds its task.
_REMEMBERED: Final = 10_000


class TaskPhase(enum.StrEnum):
    """Where a task is, seen from the network."""

    QUEUED = "queued"
    DELIVERED = "delivered"
    ENDED = "ended"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOutcome:
    """How a task ended for the network."""

    correlation_id: str
    client_id: str
    task_type: str
    #: COMPLETED, FAILED, INTERRUPTED or TIMEOUT.
    status: str
    #: What the client's report said.
    response: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    #: Why, when it was not the client that said so; else empty.
    reason: str = ""
    #: Seconds from issue to end.
    seconds: float = 0.0

    @property
    def completed(self) -> bool:
        """Whether the client did the task."""
        return self.status == "COMPLETED"


class IssuedTask:
    """One task for one client. Lives on the network's loop."""

    def __init__(self, request: pb.TaskRequest, client_id: str) -> None:
        self.request = request
        self.client_id = client_id
        self.phase = TaskPhase.QUEUED
        #: The status of the last report; empty before the first.
        self.status = ""
        #: What the client is told at each of its reports: "", INTERRUPTED or TIMEOUT.
        self.stop_status = ""
        self.deliveries = 0
        #: The client named the task in a report.
        self.held = False
        #: It went out by TaskStream: such clients report nothing but results.
        self.streamed = False
        #: An update that comes now is of no use; its model is removed.
        self.closed = False
        self.issued_at = time.monotonic()
        loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[TaskOutcome] = loop.create_future()
        self.update: asyncio.Future[UpdateReceived] = loop.create_future()
        self.validation: asyncio.Future[ValidationReceived] = loop.create_future()

    @property
    def correlation_id(self) -> str:
        """The task's id."""
        return self.request.correlation_id

    @property
    def task_type(self) -> str:
        """Scaleout_ModelUpdate for example."""
        return self.request.type

    async def done(self, timeout: float | None = None) -> TaskOutcome:  # noqa: ASYNC109 - callers want the message
        """Wait for the end; LocalNetworkError after `timeout` seconds."""
        try:
            return await asyncio.wait_for(asyncio.shield(self.ended), timeout)
        except TimeoutError:
            raise LocalNetworkError(
                f"task {self.correlation_id} ({self.task_type}) of client {self.client_id} did not end within "
                f"{timeout:g} s; it is {self.phase}, last status {self.status or '(none)'}"
            ) from None


class TaskBook:
    """Keeps the tasks. Lives on the network's loop."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._tasks: collections.OrderedDict[str, IssuedTask] = collections.OrderedDict()
        #: Open tasks by client, in the order of issue.
        self._open: dict[str, dict[str, IssuedTask]] = {}
        self._raw: dict[str, list[pb.TaskRequest]] = {}
        self._news: dict[str, asyncio.Event] = {}

    def get(self, correlation_id: str) -> IssuedTask | None:
        """Return a task, ended or not."""
        return self._tasks.get(correlation_id)

    def open_tasks(self) -> tuple[IssuedTask, ...]:
        """Return all tasks that have not ended."""
        return tuple(task for tasks in self._open.values() for task in tasks.values())

    def issue(
        self,
        client_id: str,
        task_type: str,
        *,
        model_id: str = "",
        session_id: str = "",
        round_id: str = "",
        data: Mapping[str, Any] | None = None,
    ) -> IssuedTask:
        """Queue a task for a client; `data` is what the request carries as JSON."""
        request = pb.TaskRequest(
            client_id=client_id,
            model_id=model_id,
            data=json.dumps(dict(data or {})),
            correlation_id=str(uuid.uuid4()),
            timestamp=datetime.now(UTC).isoformat(),
            session_id=session_id,
            round_id=round_id,
            type=task_type,
            status="PENDING",
        )
        return self._enter(IssuedTask(request, client_id))

    def push(self, client_id: str, request: pb.TaskRequest) -> None:
        """Put a request as it is into the answer to the client's next poll. For tests of clients."""
        self._raw.setdefault(client_id, []).append(request)

    def poll(self, client_id: str, reports: Iterable[pb.ActivityReport], *, deliver: bool) -> list[pb.TaskRequest]:
        """Take a client's reports and return its directives; new tasks only when `deliver`."""
        held: set[str] = set()
        answer: list[pb.TaskRequest] = []
        for report in reports:
            held.add(report.correlation_id)
            answer.extend(self._take_report(client_id, report))
        self._note_missing(client_id, held)
        if deliver:
            queued = [task for task in self._of(client_id) if task.phase is TaskPhase.QUEUED]
            answer.extend(self._deliver(task) for task in queued)
        return answer + self._raw.pop(client_id, [])

    async def next_streamed(self, client_id: str) -> pb.TaskRequest:
        """Wait for a task to send down the client's TaskStream."""
        news = self._news.setdefault(client_id, asyncio.Event())
        while True:
            for task in self._of(client_id):
                if task.phase is TaskPhase.QUEUED:
                    task.streamed = True
                    return self._deliver(task)
            news.clear()
            await news.wait()

    def take_update(self, event: UpdateReceived) -> IssuedTask | None:
        """Give an update to its task; returns the task, or None when there is no such task of that client."""
        task = self._tasks.get(event.correlation_id)
        if task is None or task.client_id != event.client_id:
            return None
        if not task.update.done():
            task.update.set_result(event)
        self._end_streamed(task)
        return task

    def take_validation(self, event: ValidationReceived) -> None:
        """Give a validation to its task, if there is one of that client."""
        task = self._tasks.get(event.correlation_id)
        if task is None or task.client_id != event.client_id:
            return
        if not task.validation.done():
            task.validation.set_result(event)
        self._end_streamed(task)

    def interrupt(self, task: IssuedTask, status: str = "INTERRUPTED") -> None:
        """Ask for a task's end: the client is told whenever it reports the task, until it reports it as done.

        It is told only then, because a published client starts a task whose id it does not hold, whatever the status.
        """
        if task.phase is TaskPhase.ENDED or task.stop_status:
            return
        task.stop_status = status
        self._log.emit(
            TaskInterrupted(
                client_id=task.client_id,
                correlation_id=task.correlation_id,
                task_type=task.task_type,
                status=status,
            )
        )
        if task.phase is TaskPhase.QUEUED:
            self._end(task, status, reason="never delivered")

    def client_gone(self, client_id: str, reason: str) -> None:
        """End the tasks of a client from which no report will come."""
        for task in self._of(client_id):
            self._end(task, "FAILED", reason=reason)

    def _of(self, client_id: str) -> list[IssuedTask]:
        return list(self._open.get(client_id, {}).values())

    def _enter(self, task: IssuedTask) -> IssuedTask:
        self._tasks[task.correlation_id] = task
        self._open.setdefault(task.client_id, {})[task.correlation_id] = task
        self._log.emit(
            TaskIssued(
                client_id=task.client_id,
                correlation_id=task.correlation_id,
                task_type=task.task_type,
                model_id=task.request.model_id,
                session_id=task.request.session_id,
                round_id=task.request.round_id,
            )
        )
        if task.client_id in self._news:
            self._news[task.client_id].set()
        return task

    def _deliver(self, task: IssuedTask) -> pb.TaskRequest:
        task.phase = TaskPhase.DELIVERED
        task.deliveries += 1
        self._log.emit(
            TaskDelivered(
                client_id=task.client_id,
                correlation_id=task.correlation_id,
                task_type=task.task_type,
                delivery=task.deliveries,
            )
        )
        return task.request

    def _take_report(self, client_id: str, report: pb.ActivityReport) -> list[pb.TaskRequest]:
        task = self._tasks.get(report.correlation_id)
        answer = []
        if task is None and report.command_type:
            task = self._adopt(client_id, report)
            if not report.done:
                answer.append(pb.TaskRequest(correlation_id=report.correlation_id, type=report.command_type))
        response = parse_object(report.response)
        known = task is not None and task.client_id == client_id
        self._log.emit(
            TaskReported(
                client_id=client_id,
                correlation_id=report.correlation_id,
                task_type=task.task_type if task is not None else report.command_type,
                status=report.status,
                done=report.done,
                response=response,
                known=known,
            )
        )
        if task is None or not known:
            return answer
        if task.phase is TaskPhase.ENDED:
            # Given up, and still at work there: nobody waits for it any more.
            return answer if report.done else [*answer, _stop(task, "INTERRUPTED")]
        task.phase = TaskPhase.DELIVERED
        task.held = True
        task.status = report.status
        if report.done:
            self._end(task, report.status or "UNKNOWN", response=response)
        elif task.stop_status:
            answer.append(_stop(task, task.stop_status))
        return answer

    def _adopt(self, client_id: str, report: pb.ActivityReport) -> IssuedTask:
        """Enter a task that the client started by itself (1.1); the answer that names it tells the client so."""
        request = pb.TaskRequest(
            client_id=client_id,
            correlation_id=report.correlation_id,
            type=report.command_type,
            data=report.parameters,
        )
        task = self._enter(IssuedTask(request, client_id))
        task.phase, task.held = TaskPhase.DELIVERED, True
        return task

    def _note_missing(self, client_id: str, held: set[str]) -> None:
        """Look for delivered tasks that a poll does not mention.

        Never mentioned: the answer that carried it may have got lost, so it goes out again; the same id makes it
        one task for the client. Mentioned before: the client started anew and will not report it.
        """
        for task in self._of(client_id):
            if task.phase is not TaskPhase.DELIVERED or task.streamed or task.correlation_id in held:
                continue
            if task.held:
                self._end(task, "FAILED", reason="the client no longer holds it")
            elif task.stop_status:
                self._end(task, task.stop_status, reason="the client never took it")
            elif task.deliveries >= MAX_DELIVERIES:
                self._end(task, "FAILED", reason=f"delivered {task.deliveries} times, never taken")
            else:
                task.phase = TaskPhase.QUEUED

    def _end_streamed(self, task: IssuedTask) -> None:
        if task.streamed and task.phase is not TaskPhase.ENDED:
            self._end(task, "COMPLETED")

    def _end(
        self, task: IssuedTask, status: str, *, response: Mapping[str, Any] | None = None, reason: str = ""
    ) -> None:
        task.phase = TaskPhase.ENDED
        task.status = status
        self._open[task.client_id].pop(task.correlation_id, None)
        outcome = TaskOutcome(
            correlation_id=task.correlation_id,
            client_id=task.client_id,
            task_type=task.task_type,
            status=status,
            response=response or {},
            reason=reason,
            seconds=time.monotonic() - task.issued_at,
        )
        self._log.emit(
            TaskEnded(
                client_id=task.client_id,
                correlation_id=task.correlation_id,
                task_type=task.task_type,
                status=status,
                reason=reason,
            )
        )
        task.ended.set_result(outcome)
        # The book itself stays bounded; open tasks are never dropped.
        while len(self._tasks) > _REMEMBERED:
            oldest = next(iter(self._tasks.values()))
            if oldest.phase is not TaskPhase.ENDED:
                break
            self._tasks.popitem(last=False)


def _stop(task: IssuedTask, status: str) -> pb.TaskRequest:
    request = pb.TaskRequest()
    request.CopyFrom(task.request)
    request.status = status
    return request


def parse_object(text: str) -> dict[str, Any]:
    """Return a JSON object; empty text is {}, other JSON is {"value": ...}, and no JSON at all is {"text": ...}."""
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError:
        return {"text": text}
    return value if isinstance(value, dict) else {"value": value}
