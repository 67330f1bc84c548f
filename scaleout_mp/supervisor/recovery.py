"""What a client that starts again does for the tasks of the one that was killed."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from scaleout_mp.errors import ModelError
from scaleout_mp.supervisor.endings import JobFailedError
from scaleout_mp.supervisor.job_kinds import ModelUpdateJob
from scaleout_mp.supervisor.jobs import Job, JobResources, Phase
from scaleout_mp.supervisor.restart import RESTARTED as RESTARTED_BY_ORDER
from scaleout_mp.supervisor.task_journal import KnownTask, TaskStage
from scaleout_mp.transport.aside import closing_aside
from scaleout_mp.transport.message import MessageKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from scaleout_mp.model import ScaleoutModel

logger = logging.getLogger(__name__)

#: The `error` and the `reason` of a task that was cut off.
RESTARTED = "supervisor restarted"
RESTARTED_REASON = "supervisor_restarted"


def recovered_job(task: KnownTask, resources: JobResources, *, on_start: Callable[[], None]) -> Job:
    """Return the job that brings a task of an earlier run to its end."""
    kinds: dict[TaskStage, Callable[..., Job]] = {
        TaskStage.RECEIVED: CutOffJob,
        TaskStage.RESULT: KeptResultJob,
        TaskStage.SENT: SentResultJob,
        TaskStage.RESTARTING: RestartedJob,
    }
    return kinds[task.stage](task, resources, on_start=on_start)


class CutOffJob(Job):
    """Report a task whose process died with the client, once all that it had logged has arrived."""

    runs_callback = False

    def __init__(self, task: KnownTask, resources: JobResources, *, on_start: Callable[[], None]) -> None:
        super().__init__(task.request, resources, on_start=on_start)

    async def _perform(self) -> Any:
        raise JobFailedError(RESTARTED, reason=RESTARTED_REASON)


class RestartedJob(CutOffJob):
    """Report the order to restart as obeyed."""

    async def _perform(self) -> Any:
        return RESTARTED_BY_ORDER


class KeptResultJob(ModelUpdateJob):
    """Deliver a result that the disk has and the server may not have."""

    runs_callback = False

    def __init__(self, task: KnownTask, resources: JobResources, *, on_start: Callable[[], None]) -> None:
        super().__init__(task.request, resources, on_start=on_start)
        self._known = task

    async def _perform(self) -> None:
        update_id = self._known.result["update_id"]
        try:
            async with closing_aside(await asyncio.to_thread(self._opened, update_id)) as model:
                await self._deliver(model, update_id, dict(self._known.result["meta"]))
        finally:
            await self._forget(update_id)

    def _opened(self, update_id: str) -> ScaleoutModel:
        assert self._resources.state is not None
        try:
            return self._resources.state.open_result(update_id)
        except (OSError, ModelError) as error:
            raise JobFailedError(f"{RESTARTED}, and the result is lost: {error}", reason=RESTARTED_REASON) from error


class SentResultJob(Job):
    """See a result to its end whose message is in the outbox, or has arrived."""

    runs_callback = False

    def __init__(self, task: KnownTask, resources: JobResources, *, on_start: Callable[[], None]) -> None:
        super().__init__(task.request, resources, on_start=on_start)
        self._error = task.error

    async def _perform(self) -> None:
        self.phase = Phase.REPORTING
        self._leave_place()
        if self._error is not None:
            raise JobFailedError(self._error)
        kinds = {MessageKind.UPDATE, MessageKind.VALIDATION}
        self._result = self._resources.outbox.find(self.correlation_id, kinds)
        # When it is not there any more, it has arrived.
        if self._result is not None:
            await self._until_sent(self._result.delivered())
