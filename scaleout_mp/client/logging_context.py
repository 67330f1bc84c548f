"""Which model, round and session a metric belongs to, and at which step it is."""

from __future__ import annotations

from typing import Any, Final, Protocol

from scaleout_mp.client.of_task import OfTask


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


#: That of the task which this process runs. It serves threads that the callback started and clients that its modules
#: made, which have no context of their own.
logging_of_task: Final = OfTask[LoggingContext]()
