"""What runs in the process of a staged model: it is staged there once, and then asked.

Such a process serves one model. Both calls are pickled together, so that what the stage callback leaves on the object
that it is a method of, or in its module, is there for the inference callback.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.client.calls import RequestInfo, checked_json
from scaleout_mp.client.inference_context import InferenceContext, inference_of_task
from scaleout_mp.client.logging_context import LoggingContext, logging_of_task
from scaleout_mp.client.published import model_for_callback
from scaleout_mp.client.values import callback_name
from scaleout_mp.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: Task types, as the wire has them.
STAGE_MODEL: Final = "Scaleout_StageModel"
INFERENCE: Final = "Scaleout_Inference"

#: The model that this process serves, as callbacks get it: always the same object.
_staged: Any = None


@dataclasses.dataclass(frozen=True)
class StageCall:
    """Keep the model and call a stage callback: `(model, request)`."""

    #: None: there is nothing to do but to keep the model.
    callback: Callable[..., Any] | None

    def __call__(self, model: Any, request: RequestInfo) -> None:
        """Stage `model`. None asks a process that has done so before, which it does first of all."""
        global _staged  # noqa: PLW0603 - a process serves one model
        if model is None:
            return
        staged = model_for_callback(model)
        if self.callback is not None:
            with logging_of_task.entered(LoggingContext(request=request)):
                self.callback(staged)
        _staged = staged


@dataclasses.dataclass(frozen=True)
class InferenceCall:
    """Call an inference callback with the staged model: `(parameters, for_report, request) -> result`."""

    callback: Callable[..., Any]

    def __call__(self, parameters: Any, for_report: bool, request: RequestInfo | Mapping[str, str]) -> Any:
        """Return what the callback returned; `for_report`: as JSON carries it, and what is wrong with it, or "".

        An answer that no JSON can carry is no failure: callbacks whose results went elsewhere return what they like.
        """
        if _staged is None:
            raise ModelError("this process has no staged model")
        if not isinstance(request, RequestInfo):
            request = RequestInfo(**request)
        asked = InferenceContext(inference_id=request.correlation_id, model_id=request.model_id)
        with logging_of_task.entered(LoggingContext(request=request)), inference_of_task.entered(asked):
            result = self.callback(_staged, parameters)
        if not for_report:
            return result
        try:
            return checked_json(
                result, f"inference callback {callback_name(self.callback)}", "the result", arrays=True
            ), ""
        except (TypeError, ValueError) as error:
            return None, str(error)


def calls_of(stage: Callable[..., Any] | None, infer: Callable[..., Any] | None) -> dict[str, Callable[..., Any]]:
    """Return the calls for the callbacks that there are, by task type; with any of them models can be staged."""
    calls: dict[str, Callable[..., Any]] = {}
    if stage is not None or infer is not None:
        calls[STAGE_MODEL] = StageCall(stage)
    if infer is not None:
        calls[INFERENCE] = InferenceCall(infer)
    return calls
