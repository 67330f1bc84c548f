"""What a task says of its own end: a result, which is checked before it counts, or a failure; one of them, once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from scaleout_mp.errors import ProtocolViolation
from scaleout_mp.ipc import messages, values

if TYPE_CHECKING:
    from collections.abc import Callable

    from scaleout_mp.executor.report import Evidence
    from scaleout_mp.ipc.frames import Frame


class Answer:
    """The answer of one task. Use it on the executor's event loop only."""

    def __init__(
        self, evidence: Evidence, *, max_model_size: int, on_violation: Callable[[ProtocolViolation], None]
    ) -> None:
        """`evidence` gets what came; `on_violation` is called when a result turns out to be none."""
        self._evidence = evidence
        self._max_model_size = max_model_size
        self._on_violation: Callable[[ProtocolViolation], None] | None = on_violation
        self._loop = asyncio.get_running_loop()
        self._came = False
        self._reading: asyncio.Task[Any] | None = None
        self._value: Any = None
        #: The task says that nothing of it refers to the memory that was lent for its arguments.
        self.lent_back = False

    @property
    def came(self) -> bool:
        """Whether the task has said how it ended; its result may still be under a check."""
        return self._came

    def take_result(self, frame: Frame) -> None:
        """Take a RESULT frame. Raises ProtocolViolation."""
        table = frame.fields[0] if frame.fields and frame.fields[1:] in ([], [True]) else None
        self.lent_back = len(frame.fields) > 1
        if frame.descriptors:
            # On a thread: checking a large model takes as long as reading it.
            reading = asyncio.to_thread(values.decode, table, frame.descriptors, max_model_size=self._max_model_size)
            self._reading = self._loop.create_task(reading)
            self._reading.add_done_callback(self._on_read)
        else:
            self._take_value(values.decode(table, [], max_model_size=self._max_model_size))
        self._came = True

    def take_failure(self, frame: Frame) -> None:
        """Take a FAILURE frame. Raises ProtocolViolation."""
        self._evidence.failure = messages.parse_failure(frame)
        self._came = True

    def _on_read(self, reading: asyncio.Task[Any]) -> None:
        error = reading.exception()
        if isinstance(error, ProtocolViolation):
            if self._on_violation is not None:
                self._on_violation(error)
        elif error is not None:
            # Out of descriptors or memory here: the result is lost, which is not the task's fault but its end.
            self._evidence.launcher_problem = f"its result could not be taken: {error}"
        else:
            self._take_value(reading.result())

    def _take_value(self, value: Any) -> None:
        if self._evidence.stop is None:
            self._value = value
            self._evidence.has_result = True

    async def checked(self) -> None:
        """Wait until a result that came has been checked."""
        if self._reading is not None:
            await asyncio.wait([self._reading])

    def give(self) -> Any:
        """Return the result; None: there is none. Whoever has it owns its memory. Nothing is taken any more."""
        value, self._value, self._reading = self._value, None, None
        # It leads to the task, which holds this and its arguments: a cycle would keep their models until a collection.
        self._on_violation = None
        return value
