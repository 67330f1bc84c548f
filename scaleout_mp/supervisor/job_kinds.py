"""The kinds of task: model update, validation, custom."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from typing import TYPE_CHECKING, Any

from scaleout_mp.model import ScaleoutModel
from scaleout_mp.supervisor import messages
from scaleout_mp.supervisor.endings import JobFailedError, json_text
from scaleout_mp.supervisor.inference_jobs import InferenceJob, StageModelJob
from scaleout_mp.supervisor.jobs import Job, JobResources, Phase
from scaleout_mp.supervisor.messages import TaskType
from scaleout_mp.supervisor.restart import RestartJob
from scaleout_mp.supervisor.task_journal import note_of
from scaleout_mp.transport.aside import closing_aside
from scaleout_mp.transport.message import MessageKind
from scaleout_mp.wire import edge_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable


logger = logging.getLogger(__name__)


def make_job(
    request: pb.TaskRequest, resources: JobResources, *, on_start: Callable[[], None], problem: str = ""
) -> Job:
    """Return the job for a request; one of an unknown type, or with a `problem`, fails when it runs, and says so."""
    if problem:
        return UnreadableJob(request, resources, on_start=on_start, problem=problem)
    kinds: dict[str, type[Job]] = {
        TaskType.MODEL_UPDATE: ModelUpdateJob,
        TaskType.VALIDATION: ValidationJob,
        TaskType.STAGE_MODEL: StageModelJob,
        TaskType.INFERENCE: InferenceJob,
        TaskType.RESTART: RestartJob,
    }
    return kinds.get(request.type, CustomJob)(request, resources, on_start=on_start)


class UnreadableJob(Job):
    """Tell the server that its task cannot be read."""

    def __init__(
        self, request: pb.TaskRequest, resources: JobResources, *, on_start: Callable[[], None], problem: str
    ) -> None:
        super().__init__(request, resources, on_start=on_start)
        self._problem = problem

    async def _perform(self) -> None:
        raise JobFailedError(self._problem)


class ModelUpdateJob(Job):
    """Train a model and send the result."""

    async def _perform(self) -> None:
        # A client that cannot train must not load the link with a model first.
        await self._phase(self._resources.callbacks.prepared(self.request.type))
        settings = messages.task_data(self.request, "client_settings")
        seconds = _Stopwatch()
        async with closing_aside(await self._download()) as model:
            fetched = seconds.lap()
            self._say(f"Training on model {self.request.model_id} started.", pb.LogLevel.INFO)
            trained, meta = _update(await self._execute(model, settings))
            json_text(meta, "metadata")
            processed = seconds.lap()
        meta |= {"processing_time": processed, "fetch_model": fetched, "config": self.request.data}
        update_id = str(uuid.uuid4())
        async with closing_aside(await self._renamed(trained, update_id)) as renamed:
            # The last reference: its memory is not held for as long as the upload takes.
            del trained
            keeping = asyncio.create_task(self._keep(renamed, update_id, meta))
            try:
                await self._deliver(renamed, update_id, meta, keeping)
            finally:
                await self._forget(update_id, keeping)

    async def _deliver(
        self, model: ScaleoutModel, update_id: str, meta: dict[str, Any], keeping: asyncio.Task[None] | None = None
    ) -> None:
        """Upload the result and say so; it is kept on the disk meanwhile."""
        seconds = _Stopwatch()
        self._require_not_aborted()
        self.moving = update_id
        await self._phase(self._resources.transfer.upload(model), Phase.UPLOADING)
        self.moving = None
        meta = meta | {"upload_model": seconds.lap()}
        if keeping is not None:
            # Noted first: what is noted as kept after it was noted as sent would be sent once more.
            await asyncio.wait([keeping])
        await self._send_update(update_id, meta)
        self._say("Model update completed.", pb.LogLevel.AUDIT)

    async def _keep(self, model: ScaleoutModel, update_id: str, meta: dict[str, Any]) -> None:
        """Write the result to the disk, so that a client that is killed and starts again can deliver it."""
        state = self._resources.state
        if state is None:
            return
        result = {"update_id": update_id, "meta": meta}
        try:
            await asyncio.to_thread(state.keep_result, model, update_id, note_of(self.request, result))
        except OSError as error:
            logger.warning(
                "the result of task %s cannot be kept on the disk (%s): a client that dies now loses it",
                self.correlation_id,
                error.strerror or error,
                extra={"action": "result_not_kept", "task_id": self.correlation_id},
            )
            return
        self._resources.tasks.result_kept(self.correlation_id, result)

    async def _forget(self, update_id: str, keeping: asyncio.Task[None] | None = None) -> None:
        """Remove the result from the disk: the server has it, or nobody wants it any more."""
        if keeping is not None:
            # A thread cannot be cancelled, and reads the model as long as it writes.
            await asyncio.wait([keeping])
        if self._resources.state is not None:
            await asyncio.to_thread(self._resources.state.forget_result, update_id)

    async def _renamed(self, trained: ScaleoutModel, update_id: str) -> ScaleoutModel:
        """Return the model under the id under which the server files the update; closes the one that came.

        The id is chosen here and not by the task. Weights are not copied: both models lie in the task's sealed memory.
        """
        async with closing_aside(trained):
            self._require_not_aborted()
            # On a thread all the same: a task may send a container whose metadata do not stand last.
            build = trained.to_builder().set_model_id(update_id).build
            return await self._phase(asyncio.to_thread(build), Phase.UPLOADING)

    async def _send_update(self, update_id: str, meta: dict[str, Any]) -> None:
        update = pb.ModelUpdate(
            client_id=self._resources.client_id,
            model_id=self.request.model_id,
            model_update_id=update_id,
            correlation_id=self.correlation_id,
            timestamp=messages.now(),
            meta=json.dumps(meta),
            round_id=self.request.round_id,
            session_id=self.request.session_id,
        )
        await self._hand_over(MessageKind.UPDATE, update)


class ValidationJob(Job):
    """Measure a model and send the figures."""

    async def _perform(self) -> None:
        await self._phase(self._resources.callbacks.prepared(self.request.type))
        self._say(f"Validation of model {self.request.model_id} started.", pb.LogLevel.INFO)
        async with closing_aside(await self._download()) as model:
            metrics = await self._execute(model)
        if not isinstance(metrics, dict):
            raise JobFailedError("the task's process sent no dict of metrics")
        validation = pb.ModelValidation(
            client_id=self._resources.client_id,
            model_id=self.request.model_id,
            data=json_text(metrics, "metrics"),
            correlation_id=self.correlation_id,
            timestamp=messages.now(),
            session_id=self.request.session_id,
        )
        await self._hand_over(MessageKind.VALIDATION, validation)
        self._say("Model validation completed.", pb.LogLevel.AUDIT)


class CustomJob(Job):
    """Run a custom callback; what it returns is the report's response."""

    async def _perform(self) -> Any:
        await self._phase(self._resources.callbacks.prepared(self.request.type))
        parameters = messages.task_data(self.request, "parameters")
        result = await self._execute(parameters)
        json_text(result, "a result")
        self._require_not_aborted()
        return result


def _update(value: Any) -> tuple[ScaleoutModel, dict[str, Any]]:
    """Check again what the child's own check let pass: a task's process is not to be trusted."""
    if isinstance(value, tuple | list) and len(value) == 2:
        model, meta = value
        if isinstance(model, ScaleoutModel) and isinstance(meta, dict):
            return model, meta
    raise JobFailedError("the task's process sent something else than a model and its metadata")


class _Stopwatch:
    def __init__(self) -> None:
        self._last = time.monotonic()

    def lap(self) -> float:
        """Return the seconds since the start or the last lap."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        return seconds
