"""How a client ends: its tasks are aborted, what became of them is told, and it says goodbye, all within a time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.errors import TransportError
from scaleout_mp.supervisor.jobs import Job, Phase

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scaleout_mp.supervisor.polling import Poller
    from scaleout_mp.transport.calls import CombinerCalls
    from scaleout_mp.transport.outbox import Outbox

logger = logging.getLogger(__name__)

#: Seconds, on top of the tasks' grace, that aborted tasks get until they are gone and what they logged is sent.
ABORT_MARGIN: Final = 2.0
#: Seconds for the final report, what waits in the outbox and the goodbye together, unless somebody says otherwise. Who
#: sends SIGTERM sends SIGKILL soon after: ten seconds is common.
LAST_WORDS: Final = 5.0
#: Shares of these that are kept for sending results without the records before them, and for the goodbye alone.
_RESULTS_ONLY: Final = 0.3
_GOODBYE: Final = 0.2

#: Seconds between two looks at what the jobs are at.
_LOOK_AGAIN: Final = 0.05


class Farewell:
    """The last things that a client says."""

    def __init__(
        self,
        calls: CombinerCalls,
        outbox: Outbox,
        poller: Poller,
        jobs: Mapping[str, tuple[Job, asyncio.Task[None]]],
        *,
        polls: bool,
        within: float,
    ) -> None:
        """Wait for `jobs`, a live view of those that are not over, and take `within` seconds to tell their ends."""
        self._calls = calls
        self._outbox = outbox
        self._poller = poller
        self._jobs = jobs
        self._polls = polls
        self._within = within
        self._loop = asyncio.get_running_loop()

    async def say(self, goodbye_of: str | None) -> None:
        """Send what is left and report all ends; then announce that `goodbye_of`, a client's id, goes."""
        deadline = self._loop.time() + self._within
        goodbye, results_only = _GOODBYE * self._within, _RESULTS_ONLY * self._within
        try:
            if not await self._said_all(deadline - goodbye - results_only):
                self._outbox.set_records_aside()
                await self._said_all(deadline - goodbye - results_only / 2)
                # What a job is cut off from is told as far as it is known.
                await cancelled([task for _, task in self._jobs.values()])
                await self._said_all(deadline - goodbye)
            async with asyncio.timeout_at(deadline):
                if goodbye_of is not None:
                    await self._calls.announce("Disconnect", client_id=goodbye_of, attempts=None)
        except (TransportError, TimeoutError) as error:
            logger.warning(
                "the combiner may not know that this client ended: %s",
                str(error) or f"no answer in {self._within:g} s",
                extra={"action": "goodbye_lost"},
            )

    async def until_reporting(self, within: float) -> None:
        """Wait until no job is at work; those whose messages are on their way may take longer."""
        deadline = self._loop.time() + within
        while tasks := [task for job, task in self._jobs.values() if job.phase is not Phase.REPORTING]:
            left = deadline - self._loop.time()
            if left <= 0:
                await cancelled(tasks)
                return
            await asyncio.wait(tasks, timeout=min(left, _LOOK_AGAIN))

    async def _said_all(self, deadline: float) -> bool:
        """Send and report until nothing is left to tell, not even of tasks that come meanwhile."""
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    if self._polls:
                        await self._poller.report_ends()
                    if not self._jobs:
                        return await self._outbox.drain(max(0.0, deadline - self._loop.time()))
                    await asyncio.wait([task for _, task in self._jobs.values()], return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            return False


async def cancelled(tasks: list[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they are gone; what they raise by then is nobody's any more."""
    for task in tasks:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)
