"""What the journal knows of tasks, so that each is reported once, also when the client is killed meanwhile."""

from __future__ import annotations

import dataclasses
import enum
import json
import logging
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.message import DecodeError

from scaleout_mp.supervisor.taskbook import REMEMBERED, TaskStatus
from scaleout_mp.wire import edge_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from scaleout_mp.transport.journal import Journal

logger = logging.getLogger(__name__)

_RECEIVED: Final = (
    "INSERT INTO tasks(correlation_id, number, state, request)"
    " SELECT ?, coalesce(max(number), 0) + 1, ?, ? FROM tasks WHERE true"
    " ON CONFLICT(correlation_id) DO NOTHING"
)
_RESULT: Final = "UPDATE tasks SET state = ?, result = ? WHERE correlation_id = ?"
_SENT: Final = "UPDATE tasks SET state = ?, result = '' WHERE correlation_id = ?"
_REFUSED: Final = "UPDATE tasks SET error = ? WHERE correlation_id = ?"
_ENDED: Final = "UPDATE tasks SET state = ?, result = '', status = ?, response = ? WHERE correlation_id = ?"
_TOLD: Final = "UPDATE tasks SET state = ?, request = x'', status = ?, response = ? WHERE correlation_id = ?"
_FORGET: Final = "DELETE FROM tasks WHERE state = ? AND number <= (SELECT max(number) FROM tasks) - ?"
_UNREADABLE: Final = "DELETE FROM tasks WHERE correlation_id = ?"
_ALL: Final = "SELECT correlation_id, state, request, status, response, result, error FROM tasks ORDER BY number"
#: The tasks of which something waits for the server, and whether that is a result.
_WAITING: Final = (
    "SELECT lane, max(result) FROM (SELECT lane, kind IN ('UPDATE', 'VALIDATION') AS result FROM results"
    " UNION ALL SELECT DISTINCT lane, 0 FROM records) WHERE lane != '' GROUP BY lane"
)


class TaskStage(enum.StrEnum):
    """How far a task has come; what a client that starts again has to do for it."""

    #: It was given to us. Whatever it did is lost with its process.
    RECEIVED = "received"
    #: Its result is on the disk, the server may not have it.
    RESULT = "result"
    #: The message that hands its result over is in the outbox, or has been sent.
    SENT = "sent"
    #: It ordered a restart, and the client was about to obey.
    RESTARTING = "restarting"
    #: Its end is known, and the server may not have heard of it.
    ENDED = "ended"
    #: The server has heard of its end.
    TOLD = "told"


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnownTask:
    """A task of an earlier run of the client."""

    correlation_id: str
    stage: TaskStage
    request: pb.TaskRequest
    #: Of its end, when that is known.
    status: str
    response: str
    #: Stage RESULT: what the update needs to be sent.
    result: Mapping[str, Any]
    #: Why the server refused its result.
    error: str | None


class TaskJournal:
    """Notes each step of each task. Without a journal nothing is noted, and nothing is known later."""

    def __init__(self, journal: Journal | None) -> None:
        self._journal = journal

    def received(self, request: pb.TaskRequest) -> None:
        """Note a task that is to be run."""
        self._write(_RECEIVED, request.correlation_id, TaskStage.RECEIVED, request.SerializeToString())

    def result_kept(self, correlation_id: str, result: Mapping[str, Any]) -> None:
        """Note that a task's result is on the disk, and what is needed to hand it over."""
        self._write(_RESULT, TaskStage.RESULT, json.dumps(result), correlation_id)

    def sent(self, correlation_id: str) -> None:
        """Note that the message with the result is in the outbox. Call it in the same breath."""
        self._write(_SENT, TaskStage.SENT, correlation_id)

    def restarting(self, correlation_id: str) -> None:
        """Note that the next start is what a task ordered."""
        self._write(_SENT, TaskStage.RESTARTING, correlation_id)

    def refused(self, correlation_id: str, error: str) -> None:
        """Note that the server will not take a task's result."""
        self._write(_REFUSED, error, correlation_id)

    async def ended(self, correlation_id: str, status: TaskStatus, response: str) -> None:
        """Note how a task ended; returns when that is on the disk, so that no other end can be told."""
        self.ends(correlation_id, status, response)
        if self._journal is not None:
            await self._journal.synced()

    def ends(self, correlation_id: str, status: TaskStatus, response: str) -> None:
        """Note how a task ended."""
        self._write(_ENDED, TaskStage.ENDED, status, response, correlation_id)

    def told(self, correlation_id: str, status: TaskStatus, response: str) -> None:
        """Note that the server has heard of a task's end; of the tasks told, only the last are remembered."""
        self._write(_TOLD, TaskStage.TOLD, status, response, correlation_id, vital=False)
        self._write(_FORGET, TaskStage.TOLD, REMEMBERED, vital=False)

    async def known(self) -> list[KnownTask]:
        """Return the tasks of earlier runs, in the order in which they came."""
        if self._journal is None:
            return []
        known = []
        for row in await self._journal.rows(_ALL):
            correlation_id = row[0]
            try:
                known.append(_known_task(row))
            except (ValueError, KeyError, TypeError, DecodeError) as error:
                # A client that does not start would be worse: it would never start again.
                logger.error(  # noqa: TRY400 - the line says it all
                    "what %s has of task %s cannot be read (%s: %s); it is forgotten",
                    self._journal.path,
                    correlation_id,
                    type(error).__name__,
                    error,
                    extra={"action": "task_unreadable", "task_id": correlation_id},
                )
                self._write(_UNREADABLE, correlation_id)
        return known

    async def mended(self, known: list[KnownTask], notes: Iterable[bytes]) -> list[KnownTask]:
        """Return the tasks with those that a damaged journal has lost, as far as they can be told, and note them again.

        `notes` lie beside results that are kept. Of a task whose messages wait it is known whether its result is one.
        """
        tasks = {task.correlation_id: task for task in known}
        lost = [task for note in notes if (task := _task_of(note)) is not None]
        assert self._journal is not None
        for correlation_id, sent in await self._journal.rows(_WAITING):
            stage = TaskStage.SENT if sent else TaskStage.RECEIVED
            request = pb.TaskRequest(correlation_id=correlation_id).SerializeToString()
            lost.append(_known_task((correlation_id, stage, request, "", "", "", None)))
        for task in lost:
            other = tasks.get(task.correlation_id)
            if other is None or (other.stage is TaskStage.RECEIVED and task.stage is TaskStage.RESULT):
                tasks[task.correlation_id] = task
                self.received(task.request)
                if task.stage is TaskStage.RESULT:
                    self.result_kept(task.correlation_id, task.result)
                elif task.stage is TaskStage.SENT:
                    self.sent(task.correlation_id)
        return list(tasks.values())

    def _write(self, statement: str, *row: Any, vital: bool = True) -> None:
        if self._journal is not None:
            # The enums are strings, but not of the type that sqlite3 binds.
            plain = tuple(str(value) if isinstance(value, enum.Enum) else value for value in row)
            self._journal.write(statement, plain, vital=vital)


def note_of(request: pb.TaskRequest, result: Mapping[str, Any]) -> bytes:
    """Return what is needed to hand a task's result over, to be kept beside it."""
    return json.dumps({"request": request.SerializeToString().hex(), "result": dict(result)}).encode()


def _task_of(note: bytes) -> KnownTask | None:
    """Return the task that a note is of; None, and say so, when it cannot be read."""
    try:
        said = json.loads(note)
        request = bytes.fromhex(said["request"])
        correlation_id = pb.TaskRequest.FromString(request).correlation_id
        return _known_task((correlation_id, TaskStage.RESULT, request, "", "", json.dumps(said["result"]), None))
    except (ValueError, KeyError, TypeError, DecodeError) as error:
        logger.error(  # noqa: TRY400 - the line says it all
            "what a kept result is of cannot be read (%s: %s)",
            type(error).__name__,
            error,
            extra={"action": "result_unreadable"},
        )
        return None


def _known_task(row: tuple[Any, ...]) -> KnownTask:
    """Return the task of a row of `_ALL`. Raises ValueError, KeyError, TypeError and DecodeError."""
    correlation_id, stage, request, status, response, result, error = row
    task = KnownTask(
        correlation_id=correlation_id,
        stage=TaskStage(stage),
        request=pb.TaskRequest.FromString(request),
        status=status,
        response=response,
        result=json.loads(result or "{}"),
        error=error,
    )
    if task.stage in {TaskStage.ENDED, TaskStage.TOLD}:
        TaskStatus(status)
    elif task.request.correlation_id != correlation_id:
        raise ValueError("its request is another task's")
    if task.stage is TaskStage.RESULT and not isinstance(task.result["meta"] | {}, dict):
        raise TypeError("its result has no metadata")
    return task
