"""The kinds of task that have to do with staged models: staging one, and asking one."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from scaleout_mp.supervisor import messages
from scaleout_mp.supervisor.callbacks import MissingCallbackError
from scaleout_mp.supervisor.jobs import Ending, Job, JobFailedError, Phase, json_text
from scaleout_mp.wire import edge_pb2 as pb

if TYPE_CHECKING:
    from scaleout_mp.executor import Execution, PreparedCallable
    from scaleout_mp.executor.scheduling import Place
    from scaleout_mp.supervisor.staged_model import StagedModel
    from scaleout_mp.task import ExitReport

logger = logging.getLogger(__name__)


class StagedModelJob(Job):
    """A task in the process of a staged model, which is staged first if it is not."""

    _staged: StagedModel | None = None
    _call: PreparedCallable | None = None
    _has_turn = False

    async def _ending(self) -> Ending:
        try:
            return await super()._ending()
        finally:
            if self._staged is not None:
                if self._has_turn:
                    self._staged.leave()
                self._resources.models.release(self._staged)

    async def _line_up(self) -> Place:
        if not self.request.model_id:
            raise JobFailedError("the server sent a task without a model id")
        resources = self._resources
        self._call = await self._phase(resources.callbacks.prepared(self.request.type))
        await self._stage()
        assert self._staged is not None
        await self._phase(self._staged.turn(), Phase.PENDING)
        self._has_turn = True
        return resources.core.line_up(limits=resources.inference.limits, worker=self._staged.worker(self._call))

    async def _stage(self) -> None:
        self._staged = await self._phase(self._resources.models.open(self.request.model_id), Phase.DOWNLOADING)

    async def _run_in_worker(self, *args: Any) -> Any:
        return await self._execute(*args, call=self._call, limits=self._resources.inference.limits)

    def _on_outcome(self, execution: Execution, report: ExitReport) -> None:
        assert self._staged is not None
        self._staged.note(execution, report)


class StageModelJob(StagedModelJob):
    """Load a model into the cache and have a process stage it."""

    async def _line_up(self) -> Place:
        try:
            return await super()._line_up()
        except MissingCallbackError:
            # Nobody here does anything with it; others may read the cache.
            await self._stage()
            return self._resources.core.line_up_for_slot()

    async def _perform(self) -> None:
        if self._has_turn:
            await self._run_in_worker(None)
        self._say(f"Model {self.request.model_id} staged.", pb.LogLevel.AUDIT)


class InferenceJob(StagedModelJob):
    """Ask a staged model; what the callback returns is the report's response, where JSON can carry it."""

    async def _perform(self) -> Any:
        parameters = messages.task_data(self.request, "parameters")
        answer = await self._run_in_worker(parameters, True)
        if not (isinstance(answer, tuple | list) and len(answer) == 2 and isinstance(answer[1], str)):
            raise JobFailedError("the task's process sent no answer")
        result, problem = answer
        json_text(result, "a result")
        if problem:
            told = f"the answer of task {self.request.type} is not in its report: {problem[:1000]}"
            logger.warning("%s", told, extra={"action": "answer_not_sent", "task_id": self.correlation_id})
            self._say(told, pb.LogLevel.WARNING)
        self._require_not_aborted()
        return result
