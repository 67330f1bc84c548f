"""The part of EdgeClient that has to do with inference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scaleout_mp.client.values import checked_callback
from scaleout_mp.errors import NotConnectedError
from scaleout_mp.task import current_task

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from scaleout_mp.client.runtime import AutonomousTask, EdgeClientRuntime
    from scaleout_mp.model import ScaleoutModel


class InferenceClient:
    """Staging models and asking them; a base of EdgeClient."""

    _has_runtime: bool

    if TYPE_CHECKING:

        @property
        def _runtime(self) -> EdgeClientRuntime: ...

    def _init_inference(self) -> None:
        self.inference_callback: Callable[[ScaleoutModel, dict[str, Any]], Any] | None = None
        self.stage_model_callback: Callable[[ScaleoutModel], None] | None = None

    def set_inference_callback(self, callback: Callable[[ScaleoutModel, dict[str, Any]], Any] | None) -> None:
        """Set the callback for inference: `infer(model, parameters)`.

        It is called in the process of the staged model, with what the stage-model callback left there.
        """
        self.inference_callback = checked_callback(callback, "the inference callback")

    def set_stage_model_callback(self, callback: Callable[[ScaleoutModel], None] | None) -> None:
        """Set the callback that is called once a model is staged for inference, once in each process that serves it."""
        self.stage_model_callback = checked_callback(callback, "the stage-model callback")

    def stage_model(self, model: ScaleoutModel | str) -> ScaleoutModel:
        """Stage a model, or the one of that id, for inference; return it as it lies in the model cache.

        It is loaded from the network unless it is in the cache. Blocks until its process has staged it. Raises a
        ScaleoutError: TaskError, with the report, when the stage-model callback did not complete.
        """
        if self._in_task():
            raise NotConnectedError("a task's process stages no models: call stage_model where the client was made")
        staged: ScaleoutModel = self._inference_call("stage_model")(model)
        return staged

    def run_inference(self, model: ScaleoutModel | str, params: Any = None) -> Any:
        """Return what the inference callback returns for a model, or the one of that id, which is staged if need be.

        Arrays in `params` and in the result are not pickled. A `bytearray` or `memoryview` in `params` arrives as
        `bytes`; a `bytearray` as itself where something beside it has to be pickled. Blocks. Raises a ScaleoutError:
        TaskError, with the report, when the callback did not complete.
        """
        if not self._in_task():
            return self._inference_call("run_inference")(model, params)
        if self.inference_callback is None or isinstance(model, str) or model is None:
            raise NotConnectedError(
                "a task's process has no staged models: give run_inference the model itself, in a compute package, "
                "or call your inference function"
            )
        return self.inference_callback(model, params)

    def start_autonomous_inference(
        self, model: ScaleoutModel | str, params: Mapping[str, Any] | None = None
    ) -> AutonomousTask:
        """Start an inference that no server ordered; the server sees it as "Autonomous_Scaleout_Inference".

        It sees of `params` what JSON can carry. Returns at once, with what tells how the task does, as
        `start_autonomous_task`; a model that is given stays open until then. Raises NotConnectedError before
        `init_grpchandler` and in a task's process.
        """
        if self._in_task():
            raise NotConnectedError("a task's process starts no tasks")
        started: AutonomousTask = self._inference_call("start_autonomous_inference")(model, params)
        return started

    def _in_task(self) -> bool:
        return current_task() is not None or not self._has_runtime

    def _inference_call(self, name: str) -> Callable[..., Any]:
        call: Callable[..., Any] | None = getattr(self._runtime, name, None)
        if call is None:
            raise NotConnectedError("this client's runtime runs no inference")
        return call

    def close(self) -> None:
        """End the processes that `stage_model` and `run_inference` started while `run` did not run.

        They end with the program as well.
        """
        close = getattr(self._runtime, "close", None) if self._has_runtime else None
        if close is not None:
            close()
