"""The running task's line to its supervisor."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any, Final, Protocol

from scaleout_mp.errors import ChannelError, StoppedException
from scaleout_mp.ipc import frames
from scaleout_mp.ipc.frames import Kind
from scaleout_mp.ipc.messages import MAX_KEYS, MAX_NAME, MAX_PAYLOAD, MAX_STEP, MAX_VALUE, plain_numbers
from scaleout_mp.task import set_current_task

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scaleout_mp.ipc.frames import Frame
    from scaleout_mp.task import RecordIds

#: A log message longer than this is cut, in characters.
MAX_LOG_MESSAGE: Final = 1 << 14


class Line(Protocol):
    """What a context needs of a channel."""

    def send(self, frame: bytes, descriptors: Sequence[int] = ()) -> None: ...  # noqa: D102
    def record(self, kind: Kind, *fields: Any) -> bool: ...  # noqa: D102
    def receive_ready(self) -> Frame | None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class State(Protocol):
    """What a context needs of the state that tasks hand on."""

    def values(self) -> dict[Any, Any]: ...  # noqa: D102
    def keep(self) -> None: ...  # noqa: D102


class ChannelContext:
    """`TaskContext` over the control channel."""

    def __init__(self, channel: Line, task_id: str, *, progress_every: float = 0.0, state: State | None = None) -> None:
        """`progress_every` is the time in seconds between two signs of life; 0: nobody waits for them."""
        self._channel = channel
        self._task_id = task_id
        self._main_thread = threading.get_ident()
        self._abort_reason: str | None = None
        self._state = state
        self._progress_every = progress_every
        self._next_progress = 0.0

    @property
    def task_id(self) -> str:
        """The id under which the supervisor knows this task."""
        return self._task_id

    def close(self) -> None:
        """Give up this process's copy of the channel."""
        self._channel.close()

    @property
    def state(self) -> dict[Any, Any]:
        """What the tasks of this state's name hand on to each other. Raises RuntimeError when there is none."""
        if self._state is None:
            raise RuntimeError("this task keeps no state: submit it with state=NAME")
        return self._state.values()

    def keep_state(self) -> None:
        """Send the state for the next task, if this one has touched it. Raises ValueNotSendable."""
        if self._state is not None:
            self._state.keep()

    def end(self) -> None:
        """Called once the callable has returned or raised, before the supervisor hears of it."""

    def begin(self) -> None:
        """Say that the callable begins, to who waits for signs of life."""
        if self._progress_every:
            self._show_progress()

    def log_metric(
        self,
        metrics: Mapping[str, float],
        *,
        step: int | None = None,
        context: RecordIds | None = None,
        check_abort: bool = False,
    ) -> None:
        """Send metrics; raises TypeError that names a key whose value is no number, and ValueError."""
        if step is not None and (type(step) is not int or not 0 <= step <= MAX_STEP):
            raise ValueError(f"step must be a whole number from 0 to 2**32 - 1, not {step!r}")
        where = None if context is None else (context.model_id, context.round_id, context.session_id)
        numbers = metrics if plain_numbers(metrics) else _numbers(metrics)
        mail = self._channel.record(Kind.METRIC, numbers, step, where, time.time())
        if check_abort and (mail or self._abort_reason is not None):
            self.check_abort()

    def log_attributes(self, attributes: Mapping[str, str]) -> None:
        """Send attributes; values become strings."""
        _check_count(attributes)
        values = {_name(key): str(value) for key, value in attributes.items()}
        too_long = next((key for key, value in values.items() if len(value) > MAX_VALUE), None)
        if too_long is not None:
            raise ValueError(f"attribute {too_long!r} is longer than {MAX_VALUE} characters")
        self._channel.record(Kind.ATTRIBUTES, values, time.time())

    def log_telemetry(self, telemetry: Mapping[str, float]) -> None:
        """Send telemetry; raises TypeError that names a key whose value is no number."""
        self._channel.record(Kind.TELEMETRY, _numbers(telemetry), time.time())

    def log_inference_result(self, key: str, payload: str, *, inference_id: str, model_id: str) -> None:
        """Send a result of an inference; `payload` is a JSON object. Raises ValueError when something is too long."""
        if len(payload) > MAX_PAYLOAD:
            raise ValueError(f"a result of inference is longer than {MAX_PAYLOAD} characters")
        ids = [_name(key), _name(inference_id), _name(model_id)]
        self._channel.record(Kind.INFERENCE, *ids, payload, time.time())

    def log_line(self, record: logging.LogRecord, message: str) -> None:
        """Send a record of the logging module."""
        cut = message[:MAX_LOG_MESSAGE]
        self._channel.record(Kind.LOG, record.name[:256], record.levelno, cut, record.created)

    def check_abort(self) -> None:
        """Raise StoppedException when the task was asked to stop. Outside the task's main thread: do nothing."""
        if threading.get_ident() != self._main_thread:
            return
        if self._progress_every:
            self._show_progress()
        if self._abort_reason is None:
            frame = self._channel.receive_ready()
            if frame is None or frame.kind is not Kind.ABORT:
                return
            reason, task_id = frame.fields
            if task_id != self._task_id:
                # It was on its way when the task before this one ended by itself.
                return
            self._abort_reason = str(reason)
        raise StoppedException(self._abort_reason)

    def _show_progress(self) -> None:
        now = time.monotonic()
        if now >= self._next_progress:
            self._next_progress = now + self._progress_every
            self._channel.send(frames.encode(Kind.PROGRESS))


def _name(key: object) -> str:
    name = str(key)
    if len(name) > MAX_NAME:
        raise ValueError(f"a key is longer than {MAX_NAME} characters: {name[:40]!r}...")
    return name


def _check_count(values: Mapping[str, object]) -> None:
    if len(values) > MAX_KEYS:
        raise ValueError(f"a record has {len(values)} keys; at most {MAX_KEYS} are taken at once")


def _numbers(values: Mapping[str, float]) -> dict[str, float]:
    _check_count(values)
    numbers = {}
    for key, value in values.items():
        name = _name(key)
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"{key!r} must be a number, not {type(value).__name__}") from None
    return numbers


class ForwardingHandler(logging.Handler):
    """Sends log records to the supervisor, which hands them to the loggers of the same name there."""

    #: None in a process that runs no task.
    context: ChannelContext | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record; a supervisor that is gone takes this process with it, so nobody misses the record."""
        if self.context is None:
            return
        try:
            message = self.format(record)
            self.context.log_line(record, message)
        except ChannelError:
            return
        except Exception:  # noqa: BLE001 - what a message's own __str__ raises must not end the caller
            self.handleError(record)


# Both made once, in the template: a task has no time to lose.
_handler: Final = ForwardingHandler()


def enter(context: ChannelContext, *, log_level: int) -> None:
    """Make `context` this process's task and send the standard logging module's records through it."""
    set_current_task(context)
    _handler.context = context
    _handler.setLevel(log_level)
    root = logging.getLogger()
    if not root.handlers:
        # Where the user's own module has set up logging, its handlers say it all.
        root.addHandler(_handler)
    if root.level == logging.WARNING or root.level > log_level:
        root.setLevel(log_level)


def _leave_in_fork() -> None:
    """In a process that the task forked: two writers would tear each other's frames, so it has no channel.

    There the task is unset, so that logging is refused instead of lost half-way.
    """
    context, _handler.context = _handler.context, None
    if context is not None:
        set_current_task(None)
        logging.getLogger().removeHandler(_handler)
        context.close()


os.register_at_fork(after_in_child=_leave_in_fork)
