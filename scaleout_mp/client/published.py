"""Objects of the published packages, where code of users has loaded these: taken, and given.

This package never imports them itself.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import sys
import threading
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.client.inference_context import inference_of_task
from scaleout_mp.client.logging_context import logging_of_task
from scaleout_mp.client.options import ConnectToApiResult, GrpcConnectionOptions
from scaleout_mp.client.values import inference_payload
from scaleout_mp.compat import published
from scaleout_mp.errors import ConfigError, NotConnectedError, StoppedException
from scaleout_mp.task import RecordContext, current_task

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scaleout_mp.model import ScaleoutModel
    from scaleout_mp.task import TaskContext

_MODEL_MODULE: Final = "scaleoututil.utils.model"
_CLIENT_MODULE: Final = "scaleout.client.edge_client"
_STOPPED_MODULE: Final = "scaleout.client.task_receiver"

# Models


def model_for_callback(model: ScaleoutModel) -> Any:
    """Return a model as code that has loaded the published packages expects it; its bytes are not copied."""
    module = published(_MODEL_MODULE)
    if module is None:
        return model
    try:
        theirs = module.ScaleoutModel.from_file(f"/proc/self/fd/{model.fileno()}")
    except OSError:
        # No /proc in this task's view of the files.
        with model.get_file_stream() as stream:
            theirs = module.ScaleoutModel.from_stream(stream)
    # It reads through our descriptor for as long as it lives.
    theirs._scaleout_mp_source = model  # noqa: SLF001
    return theirs


def model_from_callback(model: Any) -> Any:
    """Return a published model as ours; anything else as it is."""
    module = published(_MODEL_MODULE)
    if module is None or not isinstance(model, module.ScaleoutModel):
        return model
    from scaleout_mp.model import ScaleoutModel

    with contextlib.closing(model.get_file_stream()) as stream:
        return ScaleoutModel.from_stream(stream)


# Being stopped


def stopped(error: StoppedException) -> StoppedException:
    """Return an abort that code which catches the published exception catches as well."""
    module = published(_STOPPED_MODULE)
    return error if module is None else _both(module.StoppedException)(str(error))


@functools.cache
def _both(theirs: type[Exception]) -> type[StoppedException]:
    return type("StoppedException", (StoppedException, theirs), {"__doc__": StoppedException.__doc__})


# Clients


class _OfTask(threading.local):
    """A thread's logging context as a published client keeps it; where a thread has none, the task's."""

    def __getattr__(self, name: str) -> Any:
        if name == "value":
            return logging_of_task.get()
        raise AttributeError(name)


class _OfInference(threading.local):
    """The same for the inference context."""

    def __getattr__(self, name: str) -> Any:
        if name == "value":
            return inference_of_task.get()
        raise AttributeError(name)


class TaskRuntime:
    """`EdgeClientRuntime` of a published client in a task: what it logs goes to the supervisor."""

    def _task(self) -> TaskContext:
        task = current_task()
        if task is None:
            raise NotConnectedError("this client lives in a task's process, where no task runs at the moment")
        return task

    def send_metric(
        self, metrics: Mapping[str, float], model_id: str, step: int, round_id: str, session_id: str
    ) -> bool:
        """Log metrics."""
        where = RecordContext(model_id=model_id, round_id=round_id, session_id=session_id)
        self._task().log_metric(metrics, step=step, context=where)
        return True

    def send_attributes(self, attributes: Mapping[str, str], priority: str | None = None) -> bool:
        """Log attributes; priorities are the supervisor's to choose."""
        del priority
        self._task().log_attributes(attributes)
        return True

    def send_telemetry(
        self,
        telemetry: Mapping[str, float] | None = None,
        *,
        key: str | None = None,
        payload: Mapping[str, Any] | None = None,
        priority: str | None = None,
    ) -> bool:
        """Log telemetry, in the form of either release."""
        del priority
        self._task().log_telemetry(telemetry_values(key, payload, telemetry))
        return True

    def send_inference_result(
        self, key: str, payload: Mapping[str, Any], inference_id: str, model_id: str, priority: str | None = None
    ) -> bool:
        """Log a result of an inference."""
        del priority
        text = inference_payload(payload)
        self._task().log_inference_result(key, text, inference_id=inference_id, model_id=model_id)
        return True

    def check_task_abort(self) -> None:
        """Raise StoppedException when the task was asked to stop."""
        task = current_task()
        if task is not None:
            try:
                task.check_abort()
            except StoppedException as error:
                raise stopped(error) from None

    def get_current_task_id(self) -> str | None:
        """Return the id of the running task."""
        task = current_task()
        return None if task is None else task.task_id

    def set_client(self, client: Any) -> None:
        """Do nothing: it serves every client."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise NotConnectedError(f"{name}: a client in a task's process logs and checks for an abort, no more")


def telemetry_values(
    key: str | None, payload: Mapping[str, Any] | None, telemetry: Mapping[str, float] | None
) -> dict[str, Any]:
    """Return telemetry as numbers by key: 1.0.7 gives a dict, 1.1 a key with a payload."""
    values = dict(telemetry or {})
    if key is not None:
        for name, value in (payload or {}).items():
            values[key if name == "value" else f"{key}.{name}"] = value
    return values


def adopt(client: Any) -> None:
    """Have a published client, and what captures it, sent to tasks: there it becomes a client that logs to us."""
    if _is_published(client):
        copyreg.pickle(type(client), _reduce)


def _is_published(client: Any) -> bool:
    module = published(_CLIENT_MODULE)
    return module is not None and isinstance(client, module.EdgeClient)


def as_known_to(client: Any, result: ConnectToApiResult) -> Any:
    """Return an answer of the API as the program of a client compares it."""
    return sys.modules[_CLIENT_MODULE].ConnectToApiResult[result.name] if _is_published(client) else result


def options_from(config: Any) -> GrpcConnectionOptions:
    """Return ours for connection options of either package. Raises ConfigError when it is something else."""
    if isinstance(config, GrpcConnectionOptions):
        return config
    if not hasattr(config, "host") or not hasattr(config, "port"):
        # Of its content nothing: it may be anything, a token for one.
        raise ConfigError(
            "init_grpchandler takes the GrpcConnectionOptions that connect_to_api gives with "
            f"ConnectToApiResult.Assigned, not a {type(config).__name__}: look at its result first"
        )
    return GrpcConnectionOptions(
        host=config.host,
        port=int(config.port),
        package=getattr(config, "package", ""),
        helper_type=getattr(config, "helper_type", ""),
        grpc_secure=getattr(config, "grpc_secure", None),
    )


#: What of a published client belongs to the process that connects.
_NOT_CARRIED: Final = frozenset(
    {
        "_compute_lock",
        "_current_inference_context",
        "_current_logging_context",
        "_runtime",
        "_telemetry_stop",
        "inference_callback",
        "local_repository",
        "registered_callbacks",
        "stage_model_callback",
        "train_callback",
        "validate_callback",
    }
)


def _reduce(client: Any) -> tuple[Any, ...]:
    carried = {name: value for name, value in vars(client).items() if name not in _NOT_CARRIED}
    return _bare_client, (type(client),), carried


def _bare_client(kind: Any) -> Any:
    client = kind.__new__(kind)
    # Its constructor would open folders and load gRPC's handler.
    vars(client).update(
        train_callback=None,
        validate_callback=None,
        inference_callback=None,
        stage_model_callback=None,
        registered_callbacks={},
        local_repository=None,
        _compute_lock=None,
        _current_logging_context=_OfTask(),
        _current_inference_context=_OfInference(),
        _telemetry_stop=threading.Event(),
        _runtime=TaskRuntime(),
    )
    return client
