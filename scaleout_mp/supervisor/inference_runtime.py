"""The part of GrpcEdgeClientRuntime that has to do with inference."""

from __future__ import annotations

import abc
import functools
import logging
from typing import TYPE_CHECKING, Any

from scaleout_mp.client.inference_calls import INFERENCE
from scaleout_mp.client.values import json_value
from scaleout_mp.errors import ModelNotFoundError
from scaleout_mp.supervisor.autonomous import AutonomousTask
from scaleout_mp.supervisor.inference_jobs import OwnInferenceJob
from scaleout_mp.supervisor.local_inference import LocalInference, require_model
from scaleout_mp.task import LogLine

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping

    from scaleout_mp.client import EdgeClient
    from scaleout_mp.config import Settings
    from scaleout_mp.model import ScaleoutModel
    from scaleout_mp.supervisor.connection import Connection
    from scaleout_mp.supervisor.jobs import Job
    from scaleout_mp.supervisor.service import ClientService
    from scaleout_mp.supervisor.service_plan import ServicePlan
    from scaleout_mp.task import Record

logger = logging.getLogger(__name__)


class InferenceRuntime(abc.ABC):
    """Staging and inference for the program itself. Every method may be called from any thread."""

    settings: Settings
    _connection: Connection

    def __init__(self) -> None:
        self._records_lost = False
        self._inference = LocalInference(
            make_plan=self._plan,
            client=lambda: self.client,
            at_work=self._service_at_work,
            fetch=self._fetch,
            on_record=self._on_record,
        )

    @property
    @abc.abstractmethod
    def client(self) -> EdgeClient:
        """The client that is served."""

    @abc.abstractmethod
    def _plan(self) -> ServicePlan: ...

    @abc.abstractmethod
    def _service_at_work(self) -> tuple[asyncio.AbstractEventLoop, ClientService] | None: ...

    @abc.abstractmethod
    async def _download(self, model_id: str) -> ScaleoutModel: ...

    @abc.abstractmethod
    def _send(self, record: Record) -> bool: ...

    @abc.abstractmethod
    def start_own_task(self, task: AutonomousTask, make: Callable[..., Job]) -> AutonomousTask:
        """Have a job done as a task of the client's own."""

    def stage_model(self, model: ScaleoutModel | str) -> ScaleoutModel:
        """Put a model, or the one of that id, into the model cache and have a process stage it; blocks.

        Needs no network for a model that is there. Raises a ScaleoutError, TaskError when the stage callback failed.
        """
        return self._inference.stage(model)

    def run_inference(self, model: ScaleoutModel | str, params: Any = None) -> Any:
        """Run the inference callback in the process of a staged model and return what it returned; blocks.

        Raises a ScaleoutError, TaskError when the callback did not complete.
        """
        return self._inference.infer(model, params)

    def start_autonomous_inference(
        self, model: ScaleoutModel | str, params: Mapping[str, Any] | None = None
    ) -> AutonomousTask:
        """Start an inference by oneself; see EdgeClient. Raises ModelError and NotConnectedError."""
        require_model(model)
        parameters = dict(params or {})
        model_id = model if isinstance(model, str) else model.model_id
        seen = {**_what_json_carries(parameters), "model_id": model_id}
        make = functools.partial(OwnInferenceJob, model=model, parameters=parameters)
        return self.start_own_task(AutonomousTask(f"Autonomous_{INFERENCE}", seen), make)

    def close(self) -> None:
        """End the processes that `stage_model` and `run_inference` started while `run` did not run."""
        self._inference.close()

    async def _fetch(self, model_id: str) -> ScaleoutModel:
        if not self._connection.known:
            raise ModelNotFoundError(
                f"model {model_id} is not in the model cache {self.settings.model_cache_dir}, and this client is not "
                "connected to load it from the network"
            )
        return await self._download(model_id)

    def _on_record(self, record: Record) -> None:
        if self._connection.known:
            self._send(record)
        elif not self._records_lost and not isinstance(record, LogLine):
            self._records_lost = True
            logger.warning(
                "what inference callbacks log goes nowhere: the client is not connected",
                extra={"action": "inference_records_lost"},
            )


def _what_json_carries(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters for a server to see; of what is no JSON, what it is."""
    seen: dict[str, Any] = {}
    for name, value in parameters.items():
        try:
            seen[str(name)] = json_value(value, path=str(name))
        except (TypeError, ValueError):
            shape = getattr(value, "shape", None)
            seen[str(name)] = type(value).__name__ if shape is None else f"{type(value).__name__} {tuple(shape)}"
    return seen
