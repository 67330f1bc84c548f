"""The kinds of task that have to do with staged models: staging one, and asking one."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, ClassVar

from scaleout_mp.supervisor import messages
from scaleout_mp.supervisor.callbacks import MissingCallbackError
from scaleout_mp.supervisor.endings import Ending, JobFailedError, json_text
from scaleout_mp.supervisor.jobs import Job, JobResources, Phase
from scaleout_mp.supervisor.messages import TaskType
from scaleout_mp.wire import edge_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable

    from scaleout_mp.executor import Execution, PreparedCallable
    from scaleout_mp.executor.scheduling import Place
    from scaleout_mp.model import ScaleoutModel
    from scaleout_mp.supervisor.staged_model import StagedModel
    from scaleout_mp.task import ExitReport

logger = logging.getLogger(__name__)


class StagedModelJob(Job):
    """A task in the process of a staged model, which is staged first if it is not."""

    #: Which callback it is about, whatever the server calls the task.
    task_type: ClassVar[TaskType]
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
        self._call = await self._phase(resources.callbacks.prepared(self.task_type))
        await self._stage()
        assert self._staged is not None
        await self._phase(self._staged.turn(), Phase.PENDING)
        self._has_turn = True
        return resources.core.line_up(limits=resources.inference.limits, worker=self._staged.worker(self._call))

    async def _stage(self) -> None:
        self._staged = await self._phase(self._resources.models.open(self.request.model_id), Phase.DOWNLOADING)

    async def _run_in_worker(self, *args: Any) -> Any:
        assert self._call is not None
        callbacks = self._resources.callbacks
        return await self._run(
            self._call,
            *callbacks.leading(self.task_type),
            *args,
            self._request_info(),
            name=callbacks.name(self.task_type),
            limits=self._resources.inference.limits,
        )

    def _on_outcome(self, execution: Execution, report: ExitReport) -> None:
        assert self._staged is not None
        self._staged.note(execution, report)


class StageModelJob(StagedModelJob):
    """Load a model into the cache and have a process stage it."""

    task_type = TaskType.STAGE_MODEL

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

    task_type = TaskType.INFERENCE

    def _parameters(self) -> dict[str, Any]:
        return messages.task_data(self.request, "parameters")

    async def _perform(self) -> Any:
        answer = await self._run_in_worker(self._parameters(), True)
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


class OwnInferenceJob(InferenceJob):
    """Inference that the client started by itself."""

    def __init__(
        self,
        request: pb.TaskRequest,
        resources: JobResources,
        *,
        on_start: Callable[[], None],
        model: ScaleoutModel | str,
        parameters: dict[str, Any],
    ) -> None:
        own = pb.TaskRequest()
        own.CopyFrom(request)
        # What the client starts by itself names no model on the wire.
        own.model_id = model if isinstance(model, str) else model.model_id or "unnamed"
        super().__init__(own, resources, on_start=on_start)
        self._model: ScaleoutModel | str | None = model
        self._given = parameters

    async def _stage(self) -> None:
        model, self._model = self._model, None
        if model is None or isinstance(model, str):
            await super()._stage()
        else:
            self._staged = await self._phase(self._resources.models.open_given(model), Phase.DOWNLOADING)

    def _parameters(self) -> dict[str, Any]:
        return self._given
