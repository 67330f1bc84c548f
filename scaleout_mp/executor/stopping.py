"""How a task is brought to its end: asked, looked at where it is stuck, then killed with all its descendants."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.executor import ladder
from scaleout_mp.ipc import frames
from scaleout_mp.ipc.frames import Kind
from scaleout_mp.sandbox import memory, tree
from scaleout_mp.task import EndReason, StopStage

if TYPE_CHECKING:
    from collections.abc import Callable

    from scaleout_mp.executor.launcher import Child, Launcher
    from scaleout_mp.executor.report import Evidence
    from scaleout_mp.executor.task_process import TaskProcess

#: Seconds that a process which is being started may take to appear before its launcher counts as stuck.
_START_GRACE: Final = 1.0

#: Descendants of a task beyond which a search for them is not for the event loop.
_MANY: Final = 32

#: Seconds that a task's stacks may take to be had from inside, where no grace bounds them, and from outside.
_STACKS_ALL: Final = 0.3
_SPY: Final = 1.0

#: Ends at which the question is where the task was stuck.
_STUCK: Final = frozenset({EndReason.WALL_TIME, EndReason.NO_PROGRESS})


class Stopping:
    """The stopping of one task. Use it on the executor's event loop only."""

    def __init__(self, process: TaskProcess, launcher: Launcher, evidence: Evidence) -> None:
        """`process` is what there is to stop by then; `evidence` gets how it came about, and the stacks."""
        self._process = process
        self._launcher = launcher
        self._evidence = evidence
        self._loop = asyncio.get_running_loop()
        self._climbing: asyncio.Task[None] | None = None
        #: Due when killing one process after the other takes long.
        self._last_resort: asyncio.TimerHandle | None = None
        #: Done when the grace is called off.
        self.hurried: asyncio.Future[None] = self._loop.create_future()

    def begin(self, abort_text: str, grace: float, gone: Callable[[Child], asyncio.Future[Any]]) -> None:
        """Ask the task to stop, and kill it when it has not done so within `grace` seconds. Further calls do nothing.

        `gone` returns what is done once the task needs no further stopping.
        """
        if self._climbing is None:
            self._climbing = self._loop.create_task(self._climb_when_started(abort_text, grace, gone))

    def hurry(self) -> None:
        """Call off the grace."""
        if not self.hurried.done():
            self.hurried.set_result(None)

    async def over(self) -> None:
        """Wait until the stopping has come to its end, where it has begun."""
        if self._climbing is not None:
            await self._climbing

    def close(self) -> None:
        """Do nothing more."""
        if self._last_resort is not None:
            self._last_resort.cancel()

    def forget(self) -> None:
        """Let go of what refers to the task."""
        self._climbing = None

    def kill_known(self) -> None:
        """Kill what is below the first process, and what the last look has seen; the sweep finds the others."""
        tag, watched = self._process.tag, self._process.tree
        self._launcher.doom(tag)
        self.kill_group_later()
        if watched is not None:
            # All at once: what they share is freed when the last of them goes, and each takes its time to go.
            below = memory.descendants(watched.pid, most=_MANY)
            for pid in dict.fromkeys([*below, *watched.pids[:_MANY]]):
                if not tree.is_tracker(pid):
                    tree.signal_process(pid, tag, signal.SIGKILL)

    def kill_group_later(self) -> None:
        """Have the kernel kill what is left when those who clean up after others have had their time."""
        if self._process.group is not None and self._last_resort is None:
            self._last_resort = self._loop.call_later(tree.TRACKER_GRACE, self._process.group.kill)

    async def _climb_when_started(
        self, abort_text: str, grace: float, gone: Callable[[Child], asyncio.Future[Any]]
    ) -> None:
        task_id, child, lines = self._evidence.task_id, self._process.child, self._process.lines
        if child is None or lines is None:
            # It was over before this began.
            return
        # Before it is started there is nothing to signal.
        waits: list[asyncio.Future[Any]] = [child.started, self.hurried]
        await asyncio.wait(waits, timeout=max(grace, _START_GRACE), return_when=asyncio.FIRST_COMPLETED)
        if not child.started.done():
            self._launcher.abandon(task_id)
        if self._evidence.stop is not None and self._evidence.stop.reason in _STUCK:
            await self._take_stacks(None, forcibly=grace == 0)
        await ladder.climb(
            tag=self._process.tag,
            group=child.tree_group,
            grace=grace,
            ask=lambda: lines.channel.send(frames.encode(Kind.ABORT, abort_text, task_id)),
            not_heeded=lambda: self._take_stacks(self._loop.time() + grace / 4),
            gone=gone(child),
            hurry=self.hurried,
            on_stage=self._on_stage,
            kill_first=self.kill_known,
        )

    async def _take_stacks(self, until: float | None, *, forcibly: bool = True) -> None:
        """Note where the task is, once: later it is on its way out, or gone.

        `until`: when it should be done, on the loop's clock; with that, somebody is asked who looks from outside.
        `forcibly`: if it does not answer otherwise, in a way that may crash it; only once it is to be killed anyway.
        """
        seen, tag, watched, lines = self._evidence, self._process.tag, self._process.tree, self._process.lines
        if seen.stacks is not None or watched is None or lines is None:
            return

        def left() -> float:
            return _STACKS_ALL if until is None else max(0.0, until - self._loop.time())

        seen.stacks = await lines.take_stacks(watched.pid, tag, gently=True, seconds=left() / 3)
        if seen.stacks is None and forcibly:
            seen.stacks_forced = True
            seen.stacks = await lines.take_stacks(watched.pid, tag, gently=False, seconds=left() / 2)
        if seen.stacks is None and until is not None and left() > 0:
            seen.stacks = await lines.take_stacks_from_outside(watched.pid, tag, seconds=min(_SPY, left()))

    def _on_stage(self, stage: StopStage) -> None:
        self._evidence.stopped_by = stage
