"""What a client logs: metrics, attributes, telemetry and results of inference, from a task and from outside of any."""

from __future__ import annotations

import contextlib
import logging
import operator
import threading
from typing import TYPE_CHECKING, Any

from scaleout_mp.client.inference_context import InferenceContext, inference_of_task
from scaleout_mp.client.logging_context import LoggingContext, logging_of_task
from scaleout_mp.client.published import stopped, telemetry_values
from scaleout_mp.client.values import attribute_values, inference_payload, metric_values
from scaleout_mp.errors import NotConnectedError, StoppedException
from scaleout_mp.ipc.messages import plain_numbers
from scaleout_mp.task import current_task

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from scaleout_mp.client.runtime import EdgeClientRuntime

logger = logging.getLogger(__name__)


class RecordLogging:
    """The part of EdgeClient that logs. No abstract base: users derive from it together with classes of their own."""

    def __init__(self) -> None:
        self._local = threading.local()

    if TYPE_CHECKING:

        @property
        def _runtime(self) -> EdgeClientRuntime: ...

        def check_task_abort(self) -> None: ...  # noqa: D102

    @property
    def current_logging_context(self) -> LoggingContext | None:
        """The logging context of the running thread; in a task, the task's own where there is none."""
        own: LoggingContext | None = getattr(self._local, "context", None)
        return logging_of_task.get() if own is None else own

    @current_logging_context.setter
    def current_logging_context(self, context: LoggingContext | None) -> None:
        self._local.context = context

    @contextlib.contextmanager
    def logging_context(self, context: LoggingContext) -> Iterator[None]:
        """Set the logging context of the running thread for the block."""
        previous = getattr(self._local, "context", None)
        self._local.context = context
        try:
            yield
        finally:
            self._local.context = previous

    def log_metric(
        self,
        metrics: Mapping[str, Any],
        step: int | None = None,
        commit: bool = True,
        check_task_abort: bool = True,
        context: LoggingContext | None = None,
    ) -> bool:
        """Log metrics of one step; return whether they were taken.

        `step` moves the context to that step; without it the context's step is used. `commit` moves the
        context one step on. Raises TypeError that names the key of a value that is not a number, ValueError
        on too many or too long keys, and StoppedException when the task was aborted and `check_task_abort` is
        true.
        """
        values = metrics if plain_numbers(metrics) else metric_values(metrics)
        if context is None:
            context = self.current_logging_context
        if context is None:
            logger.error(
                "metrics %s are not logged: this thread has no logging context; enter client.logging_context",
                sorted(values),
                extra={"action": "metric_without_context"},
            )
            return False
        if step is None:
            step = context.step
        if type(step) is not int or not 0 <= step < 1 << 32:
            step = _checked_step(step)
        context.step = step + 1 if commit else step
        task = current_task()
        if task is not None:
            # Called for each step of a training, and cold each time: few functions, so that it costs it little.
            try:
                task.log_metric(values, step=step, context=context, check_abort=check_task_abort)
            except StoppedException as error:
                raise stopped(error) from None
            return True
        taken = self._runtime.send_metric(
            metrics=dict(values),
            model_id=context.model_id,
            step=step,
            round_id=context.round_id,
            session_id=context.session_id,
        )
        if check_task_abort:
            self.check_task_abort()
        return taken

    def log_attributes(
        self, attributes: Mapping[str, Any], check_task_abort: bool = True, *, priority: str | None = None
    ) -> bool:
        """Log attributes of this client, as strings; return whether they were taken.

        Priorities are the client's to choose. Raises ValueError that names the key of what is too long, or on too many.
        """
        del priority
        values = attribute_values(attributes)
        task = current_task()
        if task is not None:
            task.log_attributes(values)
            taken = True
        else:
            taken = self._runtime.send_attributes(values)
        if check_task_abort:
            self.check_task_abort()
        return taken

    def log_telemetry(
        self,
        telemetry: Mapping[str, Any] | str | None = None,
        payload: Mapping[str, Any] | bool | None = None,
        check_task_abort: bool = True,
        *,
        key: str | None = None,
        priority: str | None = None,
    ) -> bool:
        """Log measurements of this machine; return whether they were taken.

        `telemetry` is a dict of numbers; or, as in `scaleout` 1.1, a key, with a dict of numbers as its `payload`:
        "value" in it goes under the key, any other name under "key.name". Priorities are the client's to choose.
        Raises TypeError that names the key of a value that is not a number.
        """
        del priority
        numbers = None if isinstance(payload, bool) else payload
        if isinstance(payload, bool):
            # The place that it had in release 1.0.
            check_task_abort = payload
        if isinstance(telemetry, str):
            telemetry, key = None, telemetry
        given: Any = telemetry if key is None else telemetry_values(key, numbers, telemetry)
        values = metric_values(given, what="telemetry value")
        task = current_task()
        if task is not None:
            task.log_telemetry(values)
            taken = True
        else:
            taken = self._runtime.send_telemetry(values)
        if check_task_abort:
            self.check_task_abort()
        return taken

    @property
    def current_inference_context(self) -> InferenceContext | None:
        """The inference context of the running thread; in a task, the task's own where there is none."""
        own: InferenceContext | None = getattr(self._local, "inference", None)
        return inference_of_task.get() if own is None else own

    @current_inference_context.setter
    def current_inference_context(self, context: InferenceContext | None) -> None:
        self._local.inference = context

    @contextlib.contextmanager
    def inference_context(self, context: InferenceContext) -> Iterator[None]:
        """Set the inference context of the running thread for the block."""
        previous = getattr(self._local, "inference", None)
        self._local.inference = context
        try:
            yield
        finally:
            self._local.inference = previous

    def log_inference_result(
        self,
        key: str,
        payload: Mapping[str, Any],
        context: InferenceContext | None = None,
        priority: str | None = None,
    ) -> bool:
        """Log a result of an inference, such as a detection; return whether it was taken.

        `payload` is JSON; a value that is no dict is sent as {"value": it}. Without a `context` the thread's own says
        which inference it belongs to. Priorities are the client's to choose. Raises TypeError that names what JSON
        cannot carry, and ValueError on more than 256 KiB of it. Servers before release 1.1 take no such results.
        """
        del priority
        text = inference_payload(payload)
        if context is None:
            context = self.current_inference_context
        if context is None:
            logger.error(
                "result %r is not logged: this thread has no inference context; enter client.inference_context",
                key,
                extra={"action": "result_without_context"},
            )
            return False
        ids = {"inference_id": context.inference_id, "model_id": context.model_id}
        task = current_task()
        if task is not None:
            task.log_inference_result(key, text, **ids)
            return True
        send = getattr(self._runtime, "send_inference_result", None)
        if send is None:
            raise NotConnectedError("this client's runtime takes no results of inference")
        taken: bool = send(key=key, payload=text, **ids)
        return taken


def _checked_step(step: Any) -> int:
    try:
        number = operator.index(step)
    except TypeError:
        raise TypeError(f"step must be a whole number, not {step!r}") from None
    if not 0 <= number < 1 << 32:
        raise ValueError(f"step must be from 0 to 2**32 - 1, not {number}")
    return number
