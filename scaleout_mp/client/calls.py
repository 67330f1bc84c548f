"""What runs in the child around a callback: enter its logging context, call it, check what it gave back.

These objects are pickled once and called with the model, the parameters and the request. What a callback
returns is checked here, before it crosses the process boundary, so that the error has the callback's own
process and name.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from scaleout_mp.client.logging_context import LoggingContext, logging_of_task
from scaleout_mp.client.published import model_for_callback, model_from_callback
from scaleout_mp.client.values import MAX_JSON, callback_name, json_value

if TYPE_CHECKING:
    from collections.abc import Callable

    from scaleout_mp.model import ScaleoutModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestInfo:
    """The child's copy of a task request; `LoggingContext.request` inside a task."""

    type: str
    correlation_id: str
    model_id: str
    round_id: str
    session_id: str


@dataclasses.dataclass(frozen=True)
class TrainCall:
    """Call a train callback: `(model, client_settings, request) -> (model, metadata)`."""

    callback: Callable[..., Any]

    def __call__(
        self, model: ScaleoutModel, settings: dict[str, Any], request: RequestInfo
    ) -> tuple[ScaleoutModel, dict[str, Any]]:
        """Return the new model and its metadata, checked. Raises TypeError or ValueError in one line."""
        with logging_of_task.entered(LoggingContext(request=request)):
            returned = self.callback(model_for_callback(model), settings)
        return _checked_update(returned, f"train callback {callback_name(self.callback)}")


@dataclasses.dataclass(frozen=True)
class ValidateCall:
    """Call a validate callback: `(model, request) -> metrics`."""

    callback: Callable[..., Any]

    def __call__(self, model: ScaleoutModel, request: RequestInfo) -> dict[str, Any]:
        """Return the metrics with numpy scalars turned into Python's. Raises TypeError in one line."""
        with logging_of_task.entered(LoggingContext(request=request)):
            returned = self.callback(model_for_callback(model))
        who = f"validate callback {callback_name(self.callback)}"
        if not isinstance(returned, dict):
            raise TypeError(f"{who} returned {_shape(returned)}; it must return a dict of metrics")
        metrics: dict[str, Any] = checked_json(returned, who, "metrics")
        return metrics


@dataclasses.dataclass(frozen=True)
class CustomCall:
    """Call a custom callback: `(parameters, request) -> JSON-serialisable value`."""

    callback: Callable[..., Any]

    def __call__(self, parameters: dict[str, Any], request: RequestInfo) -> Any:
        """Return what the callback returned, checked to be JSON. Raises TypeError in one line."""
        with logging_of_task.entered(LoggingContext(request=request)):
            returned = self.callback(parameters)
        return checked_json(returned, f"custom callback {callback_name(self.callback)}", "result")


@dataclasses.dataclass(frozen=True)
class AutonomousCall:
    """Call what a client's program started by itself: `(request) -> JSON-serialisable value`."""

    callback: Callable[[], Any]

    def __call__(self, request: RequestInfo) -> Any:
        """Return what the callback returned, checked to be JSON. Raises TypeError in one line."""
        with logging_of_task.entered(LoggingContext(request=request)):
            returned = self.callback()
        return checked_json(returned, f"the callback {callback_name(self.callback)} of {request.type}", "result")


@dataclasses.dataclass(frozen=True)
class CallbackSet:
    """All callbacks of a client as one object: those that are methods of one object share it in the worker."""

    #: What calls the callback of each task type.
    calls: Mapping[str, Callable[..., Any]]

    def __call__(self, task_type: str, *args: Any) -> Any:
        """Call the callback for a task of this type."""
        return self.calls[task_type](*args)


def _checked_update(returned: Any, who: str) -> tuple[ScaleoutModel, dict[str, Any]]:
    from scaleout_mp.model import ScaleoutModel

    wanted = "it must return a tuple (ScaleoutModel, metadata dict)"
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise TypeError(f"{who} returned {_shape(returned)}; {wanted}")
    model, metadata = model_from_callback(returned[0]), returned[1]
    if model is None:
        raise ValueError(f"{who} returned None as the model; {wanted}")
    if not isinstance(model, ScaleoutModel):
        raise TypeError(f"{who} returned {_shape(model)} as the model; {wanted}")
    if not isinstance(metadata, dict):
        raise TypeError(f"{who} returned {_shape(metadata)} as the metadata; {wanted}")
    given = metadata.get("training_metadata")
    given = given.get("num_examples") if isinstance(given, Mapping) else None
    metadata = checked_json(metadata, who, "metadata")
    training = metadata.get("training_metadata")
    count = training.get("num_examples") if isinstance(training, dict) else None
    if isinstance(count, bool) or not isinstance(count, int | float) or not _above_zero(count):
        raise ValueError(
            f'{who} returned metadata["training_metadata"]["num_examples"] = {repr(given)[:80]}; '
            "it must be the number of training examples, finite and above 0"
        )
    return model, metadata


def _above_zero(count: float) -> bool:
    try:
        return count > 0 and math.isfinite(count)
    except OverflowError:
        # A whole number beyond any float.
        return False


def checked_json(value: Any, who: str, path: str, *, arrays: bool = False) -> Any:
    """Return what a callback returned as JSON carries it; `arrays`: those become lists.

    Raises TypeError or ValueError, in one line that says who returned it.
    """
    try:
        plain = json_value(value, path=path, arrays=arrays)
        size = len(json.dumps(plain))
    except TypeError as error:
        raise TypeError(f"{who} returned what cannot be sent: {error}") from None
    except ValueError as error:
        raise ValueError(f"{who} returned what cannot be sent: {error}") from None
    if size > MAX_JSON:
        raise ValueError(
            f"{who} returned {path} of {size} bytes of JSON; at most {MAX_JSON} are sent: "
            "put what is large into the model, or keep it on this machine"
        )
    return plain


def _shape(value: Any) -> str:
    """Say in a few words what a value is, without its contents, which may be gigabytes."""
    if value is None:
        return "None"
    if isinstance(value, tuple | list):
        inside = ", ".join(type(item).__name__ for item in value[:3]) + (", ..." if len(value) > 3 else "")
        return f"{type(value).__name__} ({inside})"
    return f"a value of type {type(value).__name__}"
