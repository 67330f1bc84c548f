"""How a task of the server's can end, and what the server hears of it."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.client.values import MAX_JSON
from scaleout_mp.errors import ScaleoutError
from scaleout_mp.supervisor import messages
from scaleout_mp.supervisor.taskbook import TaskStatus
from scaleout_mp.task import EndReason

if TYPE_CHECKING:
    from scaleout_mp.task import ExitReport
    from scaleout_mp.wire import edge_pb2 as pb

logger = logging.getLogger(__name__)

_INTERRUPTIONS: Final = frozenset(
    {EndReason.INTERRUPTED_BY_SERVER, EndReason.TIMED_OUT_BY_SERVER, EndReason.INTERRUPTED_BY_CLIENT}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ending:
    """How a job ended, as the server hears it."""

    status: TaskStatus
    #: JSON; empty for none.
    response: str = ""
    #: One line for the server's log; None: the job has said what there is to say.
    line: str | None = None
    #: The server hears of it from the next start of the client.
    told_by_next_start: bool = False


class JobFailedError(ScaleoutError):
    """The job cannot go on."""

    def __init__(self, message: str, *, reason: str = EndReason.FAILED.value) -> None:
        super().__init__(message)
        #: For programs, as the report says it.
        self.reason = reason


def ended_badly(report: ExitReport, aborted: str | None) -> Ending:
    """Return the ending of a task whose process did not complete; `aborted` says why the job was, if it was."""
    if report.reason in _INTERRUPTIONS:
        reason = report.message if aborted is None else aborted
        response = messages.interruption_response(reason, report=report)
        return Ending(status=TaskStatus.INTERRUPTED, response=json.dumps(response), line=report.explain())
    response = messages.failure_response(report.message, reason=report.reason.value, report=report)
    return Ending(status=TaskStatus.FAILED, response=json.dumps(response), line=report.explain())


def failed(request: pb.TaskRequest, error: str, reason: str = EndReason.FAILED.value) -> Ending:
    """Return the ending of a task that could not go on, and log it."""
    response = messages.failure_response(error, reason=reason)
    logger.warning(
        "task %s (%s) failed: %s",
        request.correlation_id,
        request.type,
        response["error"],
        extra={"action": "job_failed", "task_id": request.correlation_id},
    )
    line = f"task {request.type}: {response['error']}"
    return Ending(status=TaskStatus.FAILED, response=json.dumps(response), line=line)


def interrupted(request: pb.TaskRequest, reason: str, phase: str) -> Ending:
    """Return the ending of a task that was aborted in some phase of it, by no fault of its process."""
    response = messages.interruption_response(reason)
    line = f"task {request.type}: {reason} while {phase}"
    return Ending(status=TaskStatus.INTERRUPTED, response=json.dumps(response), line=line)


def json_text(value: Any, what: str) -> str:
    """Return a value that a child sent as JSON.

    The child has checked it already; but it is not to be trusted. Raises JobFailedError when the value is too long or
    is not JSON-serialisable.
    """
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise JobFailedError(f"the task sent {what} that JSON cannot carry: {error}") from error
    if len(text) > MAX_JSON:
        raise JobFailedError(f"the task sent {what} of {len(text)} bytes of JSON; at most {MAX_JSON} are sent")
    return text
