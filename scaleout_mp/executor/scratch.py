"""Scratch folders on an event loop: made when a task starts, removed on a thread when it is over."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from scaleout_mp.executor.threads import Threads
from scaleout_mp.sandbox.scratch import ScratchFolders

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

logger = logging.getLogger(__name__)

#: Seconds for which a task's report waits for its folder to be gone. A million files take longer.
_WAIT: Final = 1.0
#: Threads that remove; others than those on which trees are killed and results are read.
_REMOVERS: Final = 2
#: Removing an empty folder takes microseconds, unless the disk is busy: once it took this many seconds, threads do it
#: for so many more.
_SLOW: Final = 0.002
_SLOW_FOR: Final = 10.0
_TEMPLATES_OWN: Final = "template"


class ScratchKeeper:
    """The scratch folders of one executor. Use it on the executor's event loop only."""

    def __init__(self, parent: str | os.PathLike[str] | None) -> None:
        """Have folders made below `parent`; None: in the temp folder."""
        self._parent = parent
        self._folders: ScratchFolders | None = None
        self._threads = Threads(_REMOVERS, name="scaleout-scratch")
        self._removals: set[asyncio.Future[object]] = set()
        #: On the loop's clock.
        self._slow_until = 0.0

    async def open(self) -> None:
        """Make the base folder, and begin to remove what killed supervisors left. Raises ConfigError."""
        self._folders = folders = await asyncio.to_thread(ScratchFolders.make_base, self._parent)
        self._on_thread(folders.remove_left_over)

    @property
    def folders(self) -> ScratchFolders:
        """The folders, once `open` was called."""
        assert self._folders is not None
        return self._folders

    def make(self) -> str:
        """Make the folder of a task. Raises OSError."""
        return self.folders.make()

    def template_folder(self) -> str:
        """Make the folder for temporary files of the user's modules, which all tasks share; or return it."""
        try:
            return self.folders.make(_TEMPLATES_OWN)
        except FileExistsError:
            return f"{self.folders.path}/{_TEMPLATES_OWN}"

    async def give_back(self, path: str) -> None:
        """Remove a task's folder; returns when it is gone, or soon with the removal still at work."""
        if not self._discard(path):
            await asyncio.wait([self._on_thread(lambda: self.folders.remove(path))], timeout=_WAIT)

    def _discard(self, path: str) -> bool:
        """Remove an empty folder, if that does not hold up the loop; return whether it is gone."""
        loop = asyncio.get_running_loop()
        before = loop.time()
        if before < self._slow_until:
            return False
        gone = self.folders.discard(path)
        if loop.time() - before > _SLOW:
            self._slow_until = loop.time() + _SLOW_FOR
        return gone

    def _on_thread(self, work: Callable[[], object]) -> asyncio.Future[object]:
        removal = asyncio.get_running_loop().run_in_executor(self._threads, work)
        self._removals.add(removal)
        removal.add_done_callback(self._on_removed)
        return removal

    def _on_removed(self, removal: asyncio.Future[object]) -> None:
        self._removals.discard(removal)
        error = None if removal.cancelled() else removal.exception()
        if error is not None:
            logger.warning("scratch folders are left: %s", error, extra={"action": "scratch_left"})

    async def aclose(self, *, at_once: bool = False) -> None:
        """Remove everything; `at_once`: only what takes no time, the rest goes with the next supervisor's start."""
        folders = self._folders
        if folders is None:
            return
        if at_once:
            folders.give_up()
        while self._removals:
            await asyncio.wait(set(self._removals))
        if self._folders is not None:
            self._folders = None
            await asyncio.to_thread(folders.close)
            self._threads.shutdown(wait=False)
