"""The watches over one task: what it uses, how long it takes, whether it gets on. They decide; others stop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from typing import TYPE_CHECKING, Any, Final, Protocol

from scaleout_mp.executor.beside import beside
from scaleout_mp.executor.report import StopCause
from scaleout_mp.executor.scratch_watch import ScratchWatch
from scaleout_mp.executor.watchdog import TreeWatch
from scaleout_mp.sandbox.tree_memory import TreeMemory
from scaleout_mp.task import EndReason

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from scaleout_mp.config import Limits
    from scaleout_mp.executor.lookout import LookoutLine
    from scaleout_mp.sandbox.cgroup import MemoryGroup

#: Seconds after which somebody who is never late counts the memory: the shortest tasks are not worth the message.
_HANDED_OVER: Final = 0.01
#: Seconds that a process may take until its callable begins, where that counts as no progress.
_FIRST_SIGN: Final = 60.0


class OnBreach(Protocol):
    """What is called, once, when a limit is passed. Without a grace the task is killed at once."""

    def __call__(self, cause: StopCause, *, graceful: bool) -> None: ...  # noqa: D102


class Watches:
    """Made when the task is ordered; on the executor's event loop."""

    def __init__(
        self,
        limits: Limits,
        *,
        tag: int,
        shared: int,
        group: MemoryGroup | None,
        on_breach: OnBreach,
        scratch: str = "",
    ) -> None:
        """Watch the tree that wears `tag`.

        `shared` is the size in bytes of the models that it was handed, `scratch` the path of its scratch folder.
        """
        self._scratch = scratch
        self._limits = limits
        self._tag = tag
        self._shared = shared
        self._group = group
        self._on_breach = on_breach
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        # Most tasks of a worker are over before anything is due: a timer costs less than a coroutine.
        self._timers: list[asyncio.TimerHandle] = []
        self._last_sign = 0.0
        self._first_sign = asyncio.Event()
        self._lookout: LookoutLine | None = None
        #: None until the process runs.
        self.tree: TreeWatch | None = None
        wall_time = limits.seconds("wall_time")
        if wall_time is not None:
            self._timers.append(self._loop.call_later(wall_time, self._on_time_up, wall_time))

    def process_runs(self, pid: int, lookout: LookoutLine | None, *, cpu_before: float = 0.0) -> None:
        """Watch the tree below a process, which had used so many seconds of processor time before.

        `lookout` takes over the watch on its memory where that must not be late.
        """
        self._lookout = lookout
        self.tree = TreeWatch(
            pid=pid,
            tag=self._tag,
            memory=TreeMemory(limit=self._limits.memory_bytes, shared=self._shared),
            cpu_limit=self._limits.seconds("cpu_time"),
            cpu_before=cpu_before,
            pids_limit=self._limits.pids,
            group=self._group,
        )
        if lookout is not None and lookout.open and self.tree.to_hand_over:
            lookout.prepare()
            self._timers.append(self._loop.call_later(_HANDED_OVER, self._hand_over, lookout, self.tree))
        # A new process has nothing yet: the first look can wait as long as the limits are far.
        self._timers.append(self._loop.call_later(self.tree.pause(), self._begin_watch, self.tree))
        if self._scratch and self._limits.scratch_size is not None:
            self._run(self._watch_scratch(self.tree))
        if self._limits.no_progress is not None:
            self._run(self._watch_progress())

    def sign_of_life(self) -> None:
        """Note that something came from the task."""
        self._last_sign = self._loop.time()
        self._first_sign.set()

    def close(self) -> None:
        """Stop watching."""
        for timer in self._timers:
            timer.cancel()
        for task in self._tasks:
            task.cancel()
        if self._lookout is not None and self.tree is not None:
            self._lookout.forget(self.tree)

    def catch_up(self) -> None:
        """Hear what others have seen of the tree before it was gone."""
        if self._lookout is not None and self.tree is not None and self.tree.handed_over:
            self._lookout.catch_up()

    def _run(self, watch: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(watch)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _hand_over(self, lookout: LookoutLine, tree: TreeWatch) -> None:
        if lookout.open:
            lookout.watch(tree, lambda: self._on_breach(tree.breach(), graceful=False))

    def _begin_watch(self, tree: TreeWatch) -> None:
        self._run(self._watch_use(tree))

    async def _watch_use(self, tree: TreeWatch) -> None:
        while True:
            now = self._loop.time()
            cause = None if tree.large else tree.look(now, in_a_hurry=True)
            if tree.large:
                # It may have become so since the last look: a fork bomb has a thousand processes in no time.
                cause = await beside(functools.partial(tree.look, now))
            if cause is not None:
                # No grace: every moment of it would go into more of the same.
                self._on_breach(cause, graceful=False)
                return
            await asyncio.sleep(tree.pause())

    async def _watch_scratch(self, tree: TreeWatch) -> None:
        watch = ScratchWatch(
            folder=self._scratch, limit=self._limits.scratch_bytes, pids=lambda: tree.pids or [tree.pid]
        )
        while True:
            await asyncio.sleep(watch.pause())
            cause = await beside(watch.look) if watch.large else watch.look()
            if cause is not None:
                # No grace, as above.
                self._on_breach(cause, graceful=False)
                return

    def _on_time_up(self, wall_time: float) -> None:
        text = f"ran longer than its wall-clock limit of {wall_time:g} s"
        self._on_breach(StopCause(reason=EndReason.WALL_TIME, message=text), graceful=True)

    async def _watch_progress(self) -> None:
        limit = self._limits.seconds("no_progress")
        if limit is None:
            return
        # The first sign of life comes when the callable begins; a fresh interpreter takes its time until then.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(limit, _FIRST_SIGN)):
                await self._first_sign.wait()
        # Not an event: setting one for each frame would cost more than this look now and then.
        while (left := self._last_sign + limit - self._loop.time()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left)
        text = f"showed no progress for {limit:g} s"
        self._on_breach(StopCause(reason=EndReason.NO_PROGRESS, message=text), graceful=True)
