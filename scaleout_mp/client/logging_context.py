"""Which model, round and session a metric belongs to, and at which step it is."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator


class TaskRequestLike(Protocol):
    """What a logging context reads off a task request: the wire's message and the child's copy both fit."""

    @property
    def model_id(self) -> str:
        """The model that the task works on."""
        ...

    @property
    def round_id(self) -> str:
        """The round that the task is part of."""
        ...

    @property
    def session_id(self) -> str:
        """The session that the task is part of."""
        ...


class LoggingContext:
    """Ids and step for `EdgeClient.log_metric`; ids that are not given come from `request`."""

    def __init__(
        self,
        *,
        step: int = 0,
        model_id: str | None = None,
        round_id: str | None = None,
        session_id: str | None = None,
        request: TaskRequestLike | None = None,
    ) -> None:
        if request is not None:
            model_id = request.model_id if model_id is None else model_id
            round_id = request.round_id if round_id is None else round_id
            session_id = request.session_id if session_id is None else session_id
        self.model_id = model_id
        self.round_id = round_id
        self.session_id = session_id
        self.request: Any = request
        self.step = step


_of_task: LoggingContext | None = None


def task_logging_context() -> LoggingContext | None:
    """Return the context of the task that this process runs.

    It serves threads that the callback started and clients that its modules made, which have no context of
    their own.
    """
    return _of_task


@contextlib.contextmanager
def entered_task(context: LoggingContext) -> Iterator[None]:
    """Make `context` this process's task context for the block. Called around a callback, in the child."""
    global _of_task  # noqa: PLW0603 - a process runs one task
    previous, _of_task = _of_task, context
    try:
        yield
    finally:
        _of_task = previous
