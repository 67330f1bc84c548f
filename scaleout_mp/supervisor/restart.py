"""A restart that the server orders: whether it can be, the job that accepts it, and the program in its own place.

The order's one terminal report says that the client has restarted. So the program that comes has to tell it: it finds
the order in the journal. Only a client that keeps no journal tells it before it goes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import sys
import threading
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

from scaleout_mp.errors import RestartError
from scaleout_mp.supervisor import messages
from scaleout_mp.supervisor.endings import Ending, JobFailedError
from scaleout_mp.supervisor.jobs import Job, Phase
from scaleout_mp.supervisor.taskbook import TaskStatus

if TYPE_CHECKING:
    from scaleout_mp.executor.scheduling import Place
    from scaleout_mp.wire import edge_pb2 as pb

logger = logging.getLogger(__name__)

#: What other tasks are told.
RESTARTING: Final = "Aborted by client: the client restarts"
#: `reason` of an order that is refused.
REFUSED: Final = "refused"
#: What the order's report says.
RESTARTED: Final = {"restarted": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestartOrder:
    """What the server wants to become of the other tasks."""

    #: Abort them, with the grace that they have, and report their ends first.
    abort_ongoing_tasks: bool = False
    #: Kill them.
    force: bool = False

    @classmethod
    def of(cls, request: pb.TaskRequest) -> Self:
        """Read a task's parameters. Raises ConfigError."""
        given = messages.task_data(request, "parameters")
        return cls(abort_ongoing_tasks=_flag(given, "abort_ongoing_tasks"), force=_flag(given, "force"))


def _flag(parameters: dict[str, Any], name: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise JobFailedError(f"{name} must be true or false, not {value!r}", reason=REFUSED)
    return value


class RestartJob(Job):
    """Accept the order, or say why not. What has to be done then is the service's."""

    runs_callback = False

    async def _line_up(self) -> Place:
        # It waits for nobody: those who run are what it is about.
        return self._resources.core.place_apart()

    def _leave_place(self) -> None:
        self._place = None

    async def _perform(self) -> dict[str, bool]:
        self.phase = Phase.RUNNING
        self._resources.restart(self.correlation_id, RestartOrder.of(self.request))
        return RESTARTED

    async def run(self) -> Ending:
        """Accept the order; its end is told by the next start, when there is a journal that hands it on."""
        ending = await super().run()
        handed_on = ending.status is TaskStatus.COMPLETED and self._resources.state is not None
        return dataclasses.replace(ending, told_by_next_start=handed_on)


def why_not() -> str:
    """Return why the program of this thread cannot be replaced by itself; empty when it can."""
    if threading.current_thread() is not threading.main_thread():
        return "run() was not called in the main thread of its program"
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        return "run() was called from a notebook, or within another event loop"
    return _why_not_again()


def _why_not_again() -> str:
    """Return why the command that started this interpreter would not start the same again; empty when it would."""
    if hasattr(sys, "ps1") or sys.flags.interactive:
        return "it was started from an interactive interpreter"
    if not sys.executable or len(sys.orig_argv) < 1:
        return "its interpreter is part of another program"
    if sys.argv[:1] in ([], [""], ["-"]):
        return "its program was read from the standard input"
    if sys.argv[0] != "-c" and not os.path.exists(sys.argv[0]):
        return f"its program is not at {sys.argv[0]} any more, seen from the folder in which it is now"
    return ""


def replace_program() -> NoReturn:
    """Start this program anew in this process: the same arguments, environment, folder and process id.

    All that this package opened is close-on-exec, as all that Python opens. Raises RestartError.
    """
    command = [sys.executable, *sys.orig_argv[1:]]
    logger.info("restarting: %s", " ".join(command), extra={"action": "restarting"})
    for handler in logging.getLogger().handlers:
        handler.flush()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    try:
        os.execv(sys.executable, command)  # noqa: S606 - it is what this process was started with
    except OSError as error:
        raise RestartError(f"the client cannot be started again: {command[0]}: {error.strerror}") from error
