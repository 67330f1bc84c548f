"""The kill ladder: ask, tell, kill. Kills the whole tree; decides nothing."""

from __future__ import annotations

import asyncio
import functools
import logging
from signal import SIGTERM
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.executor.beside import beside
from scaleout_mp.sandbox import tree
from scaleout_mp.task import StopStage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from scaleout_mp.sandbox.tree_group import TreeGroup

#: Seconds in which a launcher that can tell will have told that nobody is left, unless something keeps it busy.
_TOLD_WITHIN: Final = 1.0
#: Seconds that the processes that are known have for themselves before all others are searched.
_SEARCH_AFTER: Final = 0.005
#: Seconds that a launcher needs to tell it.
_TELLING: Final = 0.03

logger = logging.getLogger(__name__)


async def climb(
    *,
    tag: int,
    group: TreeGroup | None,
    grace: float,
    ask: Callable[[], None],
    not_heeded: Callable[[], Awaitable[None]],
    gone: asyncio.Future[Any],
    hurry: asyncio.Future[None],
    on_stage: Callable[[StopStage], None],
    kill_first: Callable[[], object],
) -> None:
    """Stop a task; returns when its first process is gone. What it left behind is `sweep`'s.

    `grace` is in seconds: `ask` is called at once, `not_heeded` after half of it, before SIGTERM goes to the
    tree, and SIGKILL at its end.
    `kill_first` kills the processes that are known already: freeing their memory takes longer than the search.
    `gone` is done, in whatever way, when the first process was reaped; `hurry` when the grace is called off.
    """
    deadline = asyncio.get_running_loop().time() + grace
    if grace > 0:
        on_stage(StopStage.ABORT)
        ask()
        if await _done_by(gone, hurry, deadline - grace / 2):
            return
        if not hurry.done():
            await not_heeded()
            on_stage(StopStage.SIGTERM)
            await beside(functools.partial(tree.signal_tagged, tag, SIGTERM, group))
            if await _done_by(gone, hurry, deadline):
                return
    on_stage(StopStage.SIGKILL)
    kill_first()
    # They need the processors to give back what they have in memory: a search beside it would prolong that.
    await asyncio.wait([gone], timeout=_SEARCH_AFTER)
    while not gone.done():
        await sweep(tag, group)
        if group is not None and not gone.done():
            # Who is to reap it may be held still, by the task.
            await beside(group.thaw)
        # It may have put on its tag only now: a sweep before that did not see it.
        await asyncio.wait([gone], timeout=0.02)


async def sweep(tag: int, group: TreeGroup | None) -> int:
    """Kill every process that wears the tag; return how many there were. Goes on until none is left.

    `group` holds them all, where there is one.
    """
    killed = 0
    while True:
        try:
            return killed + await beside(functools.partial(tree.kill_tagged, tag, group=group))
        except TimeoutError as error:
            # Uninterruptible in the kernel, most likely on a dead network file system: nothing else can be done.
            logger.error("task tree survives SIGKILL: %s", error, extra={"action": "tree_survives"})  # noqa: TRY400


async def clear(tag: int, group: TreeGroup | None, cleared: asyncio.Future[int] | None) -> int:
    """Kill all that a process left behind which is gone; return how many there were.

    `cleared` is what its launcher knows: a search can miss who forks and leaves again and again, faster than it looks.
    """
    killed = await sweep(tag, group)
    if cleared is not None:
        await asyncio.wait([cleared], timeout=_TELLING)
        if group is not None and not cleared.done():
            killed += len(await beside(functools.partial(tree.kill_held, tag, group, gentle=True)))
        await asyncio.wait([cleared], timeout=_TOLD_WITHIN)
        if cleared.done():
            killed = max(killed, cleared.result())
    return killed


async def _done_by(gone: asyncio.Future[Any], hurry: asyncio.Future[None], deadline: float) -> bool:
    """Wait until the process is gone, somebody is in a hurry or the deadline is there; True when it is gone."""
    seconds = deadline - asyncio.get_running_loop().time()
    await asyncio.wait([gone, hurry], timeout=max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED)
    return gone.done()
