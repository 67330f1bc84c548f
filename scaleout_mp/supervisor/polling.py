"""Where tasks come from: the poll/report loop, or the task stream."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from scaleout_mp.errors import CallError, TransportError
from scaleout_mp.supervisor.messages import TaskType
from scaleout_mp.supervisor.rhythm import keep_calling
from scaleout_mp.wire import edge_pb2 as pb
from scaleout_mp.wire import methods

if TYPE_CHECKING:
    from collections.abc import Callable

    from scaleout_mp.supervisor.taskbook import TaskBook
    from scaleout_mp.transport.calls import CombinerCalls

logger = logging.getLogger(__name__)

#: Seconds that a poll may take at least before it counts as lost.
_POLL_TIMEOUT = 10.0


class Poller:
    """Reports what is held and takes what comes, at the server's rhythm.

    It awaits nothing but the call itself, so no download, upload or task can delay a poll.
    """

    def __init__(
        self,
        calls: CombinerCalls,
        book: TaskBook,
        *,
        client_id: str,
        interval: float,
        on_request: Callable[[pb.TaskRequest, str], None],
    ) -> None:
        """Give each task that comes to `on_request`, with what could not be read of it, if anything."""
        self._calls = calls
        self._book = book
        self._client_id = client_id
        self._interval = interval
        self._on_request = on_request
        self._under_way: asyncio.Task[None] | None = None
        #: Set it to have the server give out no new tasks.
        self.skip_tasks = False

    async def run(self) -> None:
        """Poll every interval, for ever."""
        await keep_calling("polling", self._interval, self.poll, self._calls)

    async def poll(self) -> None:
        """Send one report and take the directive. Raises TransportError.

        Who is cancelled meanwhile does not cancel the call: the server has given out the tasks in its answer.
        """
        await self.settle()
        self._under_way = asyncio.create_task(self._poll(), name="poll")
        # What it raises when nobody waits any more is nobody's.
        self._under_way.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.shield(self._under_way)

    async def settle(self) -> None:
        """Wait until no poll is under way."""
        if self._under_way is not None:
            await asyncio.wait([self._under_way])

    async def aclose(self) -> None:
        """Give up the poll that is under way."""
        if self._under_way is not None:
            self._under_way.cancel()
            await self.settle()

    async def _poll(self) -> None:
        reports = self._book.reports(self._client_id)
        report = pb.ClientReport(
            client_id=self._client_id,
            reports=reports,
            poll_interval_ms=min(round(self._interval * 1e3), (1 << 32) - 1),
            skip_polling_tasks=self.skip_tasks,
        )
        directive = await self._calls.poll(report, within=max(_POLL_TIMEOUT, self._interval))
        self._book.accepted(reports)
        # A restart last: it is refused while there are other tasks, and those that came with it count.
        for task in sorted(directive.tasks, key=lambda task: task.request.type == TaskType.RESTART):
            self._on_request(task.request, task.problem)

    async def report_ends(self) -> None:
        """Poll until the server has heard of every end so far. Runs until cancelled while it does not answer."""
        await self.settle()
        while self._book.unreported:
            await self._calls.retried("the final report", self.poll, attempts=None)


async def follow_task_stream(
    calls: CombinerCalls, *, client_id: str, on_request: Callable[[pb.TaskRequest, str], None]
) -> None:
    """Take tasks from the server's stream, for ever; a stream that ends or breaks is opened anew."""
    failures = 0
    while True:
        error: TransportError | None = None
        try:
            async for task in calls.stream(methods.TASK_STREAM, pb.ClientAvailableMessage(client_id=client_id)):
                failures = 0
                on_request(task.request, task.problem)
        except CallError as broken:
            if broken.code == "UNIMPLEMENTED":
                raise
            error = broken
        except TransportError as refused:
            error = refused
        except Exception as bug:
            # The client must not fall silent for it.
            logger.exception("the task stream failed", extra={"action": "loop_bug"})
            error = TransportError(f"{type(bug).__name__}: {bug}")
        failures += 1
        wait = calls.delay(failures)
        calls.link.failed("the task stream", error or TransportError("the server ended it"), wait)
        await asyncio.sleep(wait)
