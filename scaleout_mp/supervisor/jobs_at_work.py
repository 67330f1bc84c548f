"""The tasks that a client has: each is one job, and its end is told once."""

from __future__ import annotations

import asyncio
import collections
import functools
import json
import logging
from typing import TYPE_CHECKING, Final

from scaleout_mp.supervisor import messages
from scaleout_mp.supervisor.farewell import cancelled
from scaleout_mp.supervisor.job_kinds import make_job
from scaleout_mp.supervisor.jobs import Job, Phase
from scaleout_mp.supervisor.recovery import recovered_job
from scaleout_mp.supervisor.restart import RestartJob
from scaleout_mp.supervisor.snapshot import Death, TaskSnapshot, death, task_snapshot
from scaleout_mp.supervisor.taskbook import ABORTED_BY_SERVER, TIMED_OUT_BY_SERVER, TaskStatus, Verdict
from scaleout_mp.task import AbortOrigin

if TYPE_CHECKING:
    from scaleout_mp.supervisor.autonomous import AutonomousTask, OwnTaskOrder
    from scaleout_mp.supervisor.jobs import JobResources
    from scaleout_mp.supervisor.task_journal import KnownTask
    from scaleout_mp.supervisor.taskbook import TaskBook
    from scaleout_mp.wire import edge_pb2 as pb

logger = logging.getLogger(__name__)

ENDING: Final = "Aborted by client: the client is shutting down"
#: Ends of tasks that are remembered for who looks.
_DEATHS: Final = 10


class JobsAtWork:
    """Every method is called on the service's loop, unless it says otherwise."""

    def __init__(self, resources: JobResources, book: TaskBook, *, forgets_ended: bool) -> None:
        """`forgets_ended`: the book need not keep ends, since they are told by status messages alone."""
        self._resources = resources
        self._book = book
        self._forgets_ended = forgets_ended
        self._loop = asyncio.get_running_loop()
        #: Those that are not over, by the ids of their tasks.
        self.running: dict[str, tuple[Job, asyncio.Task[None]]] = {}
        #: Tasks of the client's own that have not ended.
        self._own: dict[str, AutonomousTask] = {}
        #: How the last tasks ended that did not complete.
        self.deaths: collections.deque[Death] = collections.deque(maxlen=_DEATHS)
        #: What tasks hear that are cut off from now on.
        self.farewell = ENDING
        self._leaving = self._closed = False

    def take(self, request: pb.TaskRequest, problem: str) -> None:
        """Take what the server says of a task; `problem` is what is wrong with what it says."""
        correlation_id = request.correlation_id
        if not correlation_id:
            said = problem or "the server sent a task without an id"
            logger.warning("%s; without an id it is ignored", said, extra={"action": "task_no_id"})
            return
        verdict = self._book.receive(request)
        if verdict is Verdict.START:
            self._start(request, problem)
        elif verdict is Verdict.ABORT:
            self.abort(correlation_id, AbortOrigin.SERVER, ABORTED_BY_SERVER)
        elif verdict is Verdict.TIME_OUT:
            self.abort(correlation_id, AbortOrigin.SERVER_TIMEOUT, TIMED_OUT_BY_SERVER)

    def _start(self, request: pb.TaskRequest, problem: str) -> None:
        correlation_id = request.correlation_id
        logger.info(
            "task %s of type %s came",
            correlation_id,
            request.type,
            extra={"action": "task_received", "task_id": correlation_id, "task_type": request.type},
        )
        self._resources.tasks.received(request)
        start = functools.partial(self._book.run, correlation_id)
        self._begin(make_job(request, self._resources, on_start=start, problem=problem))

    def go_on(self, task: KnownTask) -> None:
        """Go on with a task that an earlier run of the client left."""
        self._book.start(task.request)
        start = functools.partial(self._book.run, task.correlation_id)
        self._begin(recovered_job(task, self._resources, on_start=start))

    def start_own(self, order: OwnTaskOrder) -> None:
        """Start a task of the client's own."""
        task = order.task
        if self._closed:
            self._cut_off(task)
            return
        self._own[task.correlation_id] = task
        request = task.request()
        self._book.start(request)
        self._resources.tasks.received(request)

        def on_start() -> None:
            self._book.run(task.correlation_id)
            task.run()

        self._begin(order.make(request, self._resources, on_start=on_start))

    def _begin(self, job: Job) -> None:
        task = self._loop.create_task(self._see_through(job), name=job.correlation_id)
        self.running[job.correlation_id] = job, task
        if self._leaving:
            job.abort(AbortOrigin.CLIENT, self.farewell)

    async def _see_through(self, job: Job) -> None:
        journal = self._resources.tasks
        try:
            ending = await job.run()
            if ending.status is not TaskStatus.COMPLETED:
                self.deaths.append(death(job, ending))
            if ending.told_by_next_start:
                journal.restarting(job.correlation_id)
                return
            await journal.ended(job.correlation_id, ending.status, ending.response)
            self._finish(job.correlation_id, ending.status, ending.response)
        except asyncio.CancelledError:
            # The client ends before all that the task sent has arrived; its end may still be reported.
            ended = job.ending_if_cut_off(self.farewell)
            if ended is not None:
                journal.ends(job.correlation_id, ended.status, ended.response)
                self._finish(job.correlation_id, ended.status, ended.response)
            raise
        finally:
            del self.running[job.correlation_id]
            if self._forgets_ended:
                self._book.drop_finished()

    def _finish(self, correlation_id: str, status: TaskStatus, response: str) -> None:
        self._book.finish(correlation_id, status, response)
        own = self._own.pop(correlation_id, None)
        if own is not None:
            own.end(status, response)

    def others(self, correlation_id: str) -> int:
        """Return how many jobs beside that one have not come to where they report."""
        return sum(key != correlation_id and job.phase is not Phase.REPORTING for key, (job, _) in self.running.items())

    def snapshots(self) -> tuple[TaskSnapshot, ...]:
        """Return what is to be seen of each job. From any thread."""
        return tuple(task_snapshot(job) for job, _ in list(self.running.values()))

    def leave(self) -> None:
        """Have jobs that begin from now on be told to end."""
        self._leaving = True

    def abort(self, correlation_id: str, origin: AbortOrigin, reason: str) -> bool:
        """Ask one task to end; return whether there is such a task."""
        found = self.running.get(correlation_id)
        if found is None:
            return False
        found[0].abort(origin, reason)
        return True

    def abort_all(self, reason: str) -> None:
        """Ask all to end."""
        for job, _ in list(self.running.values()):
            job.abort(AbortOrigin.CLIENT, reason)

    async def cut_off(self, *, spare_restart: bool = False) -> None:
        """End all at once; `spare_restart`: but not the order to restart."""
        await cancelled(
            [task for job, task in self.running.values() if not (spare_restart and isinstance(job, RestartJob))]
        )

    def close(self) -> None:
        """Take no more tasks of the client's own."""
        self._closed = True

    def release(self) -> None:
        """Tell who waits for tasks of the client's own that they were cut off from what the server has to say."""
        for own in self._own.values():
            self._cut_off(own)

    @staticmethod
    def _cut_off(task: AutonomousTask) -> None:
        task.end(TaskStatus.INTERRUPTED, json.dumps(messages.interruption_response(ENDING)))
