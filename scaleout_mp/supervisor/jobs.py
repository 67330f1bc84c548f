"""One task of the server's, from its delivery to the one report of its end."""

from __future__ import annotations

import abc
import asyncio
import dataclasses
import enum
import json
import logging
import time
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

from scaleout_mp.client.calls import RequestInfo
from scaleout_mp.errors import ScaleoutError
from scaleout_mp.supervisor import endings, messages
from scaleout_mp.supervisor.endings import Ending, JobFailedError
from scaleout_mp.supervisor.taskbook import TaskStatus
from scaleout_mp.task import AbortOrigin, MetricRecord
from scaleout_mp.transport.message import MessageKind
from scaleout_mp.wire import edge_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from google.protobuf.message import Message

    from scaleout_mp.config import Limits, Settings
    from scaleout_mp.executor import Execution, ExecutorCore, PreparedCallable
    from scaleout_mp.executor.scheduling import Place
    from scaleout_mp.model import ScaleoutModel
    from scaleout_mp.supervisor.callbacks import Callbacks
    from scaleout_mp.supervisor.restart import RestartOrder
    from scaleout_mp.supervisor.staged_model import InferencePlan
    from scaleout_mp.supervisor.staged_models import StagedModels
    from scaleout_mp.supervisor.state import StateFolder
    from scaleout_mp.supervisor.task_journal import TaskJournal
    from scaleout_mp.task import ExitReport, Record
    from scaleout_mp.transport.message import Ticket
    from scaleout_mp.transport.outbox import Outbox
    from scaleout_mp.transport.progress import Progress
    from scaleout_mp.transport.transfer import ModelTransfer

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BY_SERVER = frozenset({AbortOrigin.SERVER, AbortOrigin.SERVER_TIMEOUT})

#: Seconds without a message delivered after which an aborted task's records are given up.
_STUCK: Final = 10.0


class Phase(enum.StrEnum):
    """What a job is at, for people."""

    #: Waiting for its turn.
    PENDING = "pending"
    DOWNLOADING = "downloading"
    RUNNING = "running"
    UPLOADING = "uploading"
    #: What it logged and its result are on their way.
    REPORTING = "reporting"


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobResources:
    """What every job works with. Made once, by the service."""

    client_id: str
    settings: Settings
    core: ExecutorCore
    callbacks: Callbacks
    models: StagedModels
    inference: InferencePlan
    transfer: ModelTransfer
    outbox: Outbox
    tasks: TaskJournal
    #: Where results are kept on their way; None: nowhere.
    state: StateFolder | None
    #: Has the client restart, for the task of that id. Raises JobFailedError when it does not.
    restart: Callable[[str, RestartOrder], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Abort:
    origin: AbortOrigin
    reason: str


class _InterruptedError(Exception):
    """The job was aborted between two awaits."""


class _TaskEndedError(Exception):
    """The task's process did not complete."""

    def __init__(self, report: ExitReport) -> None:
        super().__init__(report.message)
        self.report = report


class Job(abc.ABC):
    """One task. `run` never raises for what the task, the model or the network did: it returns an Ending."""

    #: Whether this kind of job needs a process for a callback.
    runs_callback: ClassVar[bool] = True

    def __init__(self, request: pb.TaskRequest, resources: JobResources, *, on_start: Callable[[], None]) -> None:
        """Call `on_start` when the job's turn has come."""
        self.request = request
        self.phase = Phase.PENDING
        #: On the monotonic clock.
        self.came_at = time.monotonic()
        self.last_metric: MetricRecord | None = None
        self.execution: Execution | None = None
        #: Id of the model that is on its way; None when none is.
        self.moving: str | None = None
        self._resources = resources
        self._on_start = on_start
        #: In the executor's line, from the first moment until the result is on its way.
        self._place: Place | None = None
        #: The result on its way, and how it all ended, once that is so.
        self._result: Ticket | None = None
        self._ended: Ending | None = None
        self._moments = messages.Moments()
        self._aborted: asyncio.Future[_Abort] = asyncio.get_running_loop().create_future()

    @property
    def correlation_id(self) -> str:
        """The id under which the server knows the task."""
        return self.request.correlation_id

    @property
    def progress(self) -> Progress | None:
        """How far the model on its way has come. From any thread."""
        return None if self.moving is None else self._resources.transfer.progress(self.moving)

    def abort(self, origin: AbortOrigin, reason: str) -> None:
        """Ask the job to end, in whatever phase it is. Further calls change nothing."""
        if self._aborted.done():
            return
        logger.info(
            "task %s: %s while %s",
            self.correlation_id,
            reason,
            self.phase,
            extra={"action": "task_aborted", "task_id": self.correlation_id, "origin": origin.value},
        )
        self._aborted.set_result(_Abort(origin=origin, reason=reason))
        if self.execution is not None:
            self.execution.abort(origin, reason)

    async def run(self) -> Ending:
        """Do the job, and return once all that it logged has reached the server."""
        ending = self._ended = self._with_drops(await self._ending())
        self.phase = Phase.REPORTING
        if ending.line is not None:
            level = pb.LogLevel.ERROR if ending.status is TaskStatus.FAILED else pb.LogLevel.WARNING
            self._say(ending.line, level)
        await self._until_sent(self._resources.outbox.flush(self.correlation_id))
        # What was given up since then has been logged, and cannot be told any more.
        self._resources.outbox.take_dropped(self.correlation_id)
        return ending

    def ending_if_cut_off(self, reason: str) -> Ending | None:
        """Return how the job ended, when `run` was cancelled; None when nobody can know.

        The result may have arrived although no answer did: to report the task as interrupted could be a lie.
        """
        if self._ended is not None:
            return self._ended
        if self._result is not None:
            if self._result.arrived:
                return Ending(status=TaskStatus.COMPLETED)
            if self._result.tried and not self._result.refused:
                return None
        return endings.interrupted(self.request, reason, self.phase)

    def _with_drops(self, ending: Ending) -> Ending:
        """Say how much of what the task logged found the outbox full."""
        dropped = self._resources.outbox.take_dropped(self.correlation_id)
        if not dropped:
            return ending
        told = f"{dropped} records of task {self.request.type} were dropped: the log says why"
        logger.warning("%s", told, extra={"action": "records_dropped", "task_id": self.correlation_id})
        self._say(told, pb.LogLevel.WARNING)
        if ending.status is TaskStatus.COMPLETED and ending.response:
            # What a custom callback returned is the user's.
            return ending
        response = json.loads(ending.response or "{}") | {"dropped_records": dropped}
        return dataclasses.replace(ending, response=json.dumps(response))

    async def _ending(self) -> Ending:
        try:
            self._place = await self._line_up()
            try:
                await self._phase(self._resources.core.turn(self._place))
                self._on_start()
                return Ending(status=TaskStatus.COMPLETED, response=messages.as_json(await self._perform()))
            finally:
                self._leave_place()
        except _InterruptedError:
            return endings.interrupted(self.request, self._aborted.result().reason, self.phase)
        except _TaskEndedError as ended:
            reason = self._aborted.result().reason if self._aborted.done() else None
            return endings.ended_badly(ended.report, reason)
        except JobFailedError as error:
            return endings.failed(self.request, str(error), error.reason)
        except ScaleoutError as error:
            return endings.failed(self.request, str(error))
        except Exception as error:
            # Whatever is wrong here, the server gets its one report, and the other tasks go on.
            logger.exception(
                "task %s failed in the client itself",
                self.correlation_id,
                extra={"action": "job_bug", "task_id": self.correlation_id},
            )
            return endings.failed(self.request, f"internal error of the client: {type(error).__name__}: {error}")

    async def _line_up(self) -> Place:
        core = self._resources.core
        if not self.runs_callback:
            return core.line_up_for_slot()
        worker = await self._phase(self._resources.callbacks.worker(self.request.type))
        return core.line_up(worker=worker)

    @abc.abstractmethod
    async def _perform(self) -> Any:
        """Do the work of this kind of task and return the report's response."""

    # What the kinds of job are made of

    async def _phase(self, work: Awaitable[T], phase: Phase | None = None) -> T:
        """Await `work` unless the job is aborted first; then cancel it and raise _InterruptedError."""
        task = asyncio.ensure_future(work)
        if phase is not None:
            self.phase = phase
        try:
            either: list[asyncio.Future[Any]] = [task, self._aborted]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
        finally:
            task.cancel()
        if task.cancelled():
            raise _InterruptedError
        return task.result()

    def _leave_place(self) -> None:
        """Let the next task begin. Further calls change nothing."""
        place, self._place = self._place, None
        if place is not None:
            self._resources.core.leave(place)

    async def _hand_over(self, kind: MessageKind, message: Message) -> None:
        """Send the job's result and wait until the combiner has it. Raises the TransportError of a refusal."""
        self._require_not_aborted()
        self.phase = Phase.REPORTING
        # Waiting for the link is no work: it must not keep other tasks from theirs.
        self._leave_place()
        # From here on it counts: a result that may have arrived is not reported as interrupted.
        self._result = self._resources.outbox.put(kind, message, task_id=self.correlation_id)
        self._resources.tasks.sent(self.correlation_id)
        await self._until_sent(self._result.delivered())

    async def _until_sent(self, sent: Coroutine[Any, Any, T]) -> T:
        """Wait for `sent`; once the server wants the task gone, records that do not move are given up."""
        outbox = self._resources.outbox
        waiter = asyncio.ensure_future(sent)
        try:
            either: list[asyncio.Future[Any]] = [waiter, self._aborted]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            while not waiter.done():
                before = outbox.waiting(self.correlation_id)
                await asyncio.wait([waiter], timeout=_STUCK)
                stuck = outbox.waiting(self.correlation_id) == before and not outbox.link_down
                if stuck and not waiter.done() and self._aborted.result().origin in _BY_SERVER:
                    outbox.give_up_records(self.correlation_id)
            return waiter.result()
        finally:
            waiter.cancel()

    def _require_not_aborted(self) -> None:
        if self._aborted.done():
            raise _InterruptedError

    async def _download(self) -> ScaleoutModel:
        if not self.request.model_id:
            raise JobFailedError("the server sent a task without a model id")
        self._require_not_aborted()
        self.moving = self.request.model_id
        try:
            return await self._phase(self._resources.transfer.download(self.moving), Phase.DOWNLOADING)
        finally:
            self.moving = None

    async def _execute(self, *args: Any) -> Any:
        """Run the callback in a process that may die and return its value."""
        self._require_not_aborted()
        self.phase = Phase.RUNNING
        callbacks = self._resources.callbacks
        call = await self._phase(callbacks.prepared(self.request.type))
        return await self._run(
            call,
            *callbacks.leading(self.request.type),
            *args,
            self._request_info(),
            name=callbacks.name(self.request.type),
        )

    async def _run(self, call: PreparedCallable, *args: Any, name: str, limits: Limits | None = None) -> Any:
        """Run `call` in a process that may die and return its value."""
        self._require_not_aborted()
        self.phase = Phase.RUNNING
        self.execution = self._resources.core.submit(
            call,
            *args,
            task_id=self.correlation_id,
            name=name,
            limits=limits,
            worker=None if self._place is None else self._place.worker,
            state=str(self.request.type),
            place=self._place,
            on_record=self._on_record,
        )
        try:
            outcome = await self.execution.outcome()
            self._on_outcome(self.execution, outcome.report)
        finally:
            # It holds the outcome, and with it a model.
            self.execution = None
        if not outcome.report.completed:
            raise _TaskEndedError(outcome.report)
        return outcome.value

    def _on_outcome(self, execution: Execution, report: ExitReport) -> None:  # noqa: B027 - most learn nothing
        """Learn from how the process ended, or went on."""

    def _request_info(self) -> RequestInfo:
        request = self.request
        return RequestInfo(
            type=request.type,
            correlation_id=request.correlation_id,
            model_id=request.model_id,
            round_id=request.round_id,
            session_id=request.session_id,
        )

    def _on_record(self, record: Record) -> None:
        if isinstance(record, MetricRecord):
            self.last_metric = record
        message = messages.record_message(self._resources.client_id, record, self._moments, task=self.request)
        if message is not None:
            self._resources.outbox.put(*message, task_id=self.correlation_id)

    def _say(self, text: str, level: pb.LogLevel) -> None:
        """Send a status message, behind all that the task has sent so far."""
        if self._resources.settings.report_status:
            kind = messages.status_type(self.request.type)
            status = messages.status(self._resources.client_id, text, level=level, type_=kind)
            self._resources.outbox.put(MessageKind.STATUS, status, task_id=self.correlation_id)
