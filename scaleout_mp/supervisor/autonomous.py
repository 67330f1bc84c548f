"""Tasks that the client starts by itself: the handle that the program gets, and the job behind it."""

from __future__ import annotations

import dataclasses
import json
import threading
import uuid
from typing import TYPE_CHECKING, Any

from scaleout_mp.client.values import MAX_JSON, json_value
from scaleout_mp.supervisor.endings import json_text
from scaleout_mp.supervisor.jobs import Job, JobResources
from scaleout_mp.supervisor.taskbook import TaskStatus
from scaleout_mp.wire import edge_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from scaleout_mp.executor import PreparedCallable
    from scaleout_mp.executor.scheduling import Place


class AutonomousTask:
    """A task that the client started by itself, as its program sees it. Every method may be called from any thread."""

    def __init__(self, command_type: str, parameters: Mapping[str, Any] | None) -> None:
        """Give the task an id. Raises TypeError and ValueError when the parameters are no JSON, or too much of it."""
        text = "" if parameters is None else json.dumps(json_value(parameters, path="parameters"))
        if len(text) > MAX_JSON:
            raise ValueError(f"the parameters have {len(text)} bytes of JSON; at most {MAX_JSON} are sent")
        #: The id under which the server knows it.
        self.correlation_id = str(uuid.uuid4())
        self.command_type = command_type
        self.parameters = parameters
        self._text = text
        self._status = TaskStatus.PENDING
        self._response: Any = None
        self._over = threading.Event()

    @property
    def status(self) -> TaskStatus:
        """PENDING, RUNNING, and how it ended: COMPLETED, FAILED or INTERRUPTED."""
        return self._status

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._over.is_set()

    @property
    def response(self) -> Any:
        """What the callback returned, or {"error": ...} or {"msg": ...}; None before the end."""
        return self._response

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, at most `timeout` seconds; return whether it has come."""
        return self._over.wait(timeout)

    def request(self) -> pb.TaskRequest:
        """Return the task as a server would have given it out."""
        return pb.TaskRequest(correlation_id=self.correlation_id, type=self.command_type, data=self._text)

    def run(self) -> None:
        """Note that it runs. Called by the service."""
        self._status = TaskStatus.RUNNING

    def end(self, status: TaskStatus, response: str) -> None:
        """Note how it ended, `response` as JSON; a second end changes nothing. Called by the service."""
        if not self._over.is_set():
            self._status, self._response = status, json.loads(response) if response else None
            self._over.set()


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnTaskOrder:
    """A task for the service to start."""

    task: AutonomousTask
    #: Makes its job: `(request, resources, on_start=...)`.
    make: Callable[..., Job]


class AutonomousJob(Job):
    """Run a callback that the program gave, in a fresh process; what it returns is the report's response."""

    def __init__(
        self,
        request: pb.TaskRequest,
        resources: JobResources,
        *,
        on_start: Callable[[], None],
        call: PreparedCallable,
        name: str,
    ) -> None:
        super().__init__(request, resources, on_start=on_start)
        self._call = call
        self._name = f"{request.type} ({name})"

    async def _line_up(self) -> Place:
        return self._resources.core.line_up()

    async def _perform(self) -> Any:
        result = await self._run(self._call, self._request_info(), name=self._name)
        json_text(result, "a result")
        self._require_not_aborted()
        return result
