"""An event loop on a thread of its own, which leaves nothing behind whenever a signal interrupts who opens it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any

from scaleout_mp.executor.threads import Threads

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine


class LoopThread:
    """A loop that lives from `open` to `close`, in the process that has opened it."""

    def __init__(
        self, *, start: Callable[[], Coroutine[Any, Any, None]], end: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        """`start` is run on the loop first, and may be cancelled; `end` last, where it has come to its end."""
        self._start = start
        self._end = end
        self._pid = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting: asyncio.Task[None] | None = None
        self._ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, name="scaleout-executor", daemon=True)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop. Ask for it once `open` has returned."""
        assert self._loop is not None
        return self._loop

    @property
    def native_id(self) -> int | None:
        """The number that the kernel has for the thread; None before `open`."""
        return self._thread.native_id

    @property
    def is_elsewhere(self) -> bool:
        """Whether this is a fork of the process that opened it: the thread is not in it."""
        return self._pid != os.getpid()

    def open(self) -> None:
        """Wait until the loop has done its first work. Raises what that raises."""
        self._thread.start()
        self._ready.result()

    def give_up(self) -> None:
        """Do so when `open` was interrupted, or has failed: the thread ends what it has begun, and nobody waits."""
        if self._ready.cancel():
            self._cancel_start()
        else:
            self._call(self.loop.stop)

    def run(self, work: Coroutine[Any, Any, None], seconds: float | None = None) -> None:
        """Have the loop do something and wait for it. Raises TimeoutError, and what the work raises."""
        asyncio.run_coroutine_threadsafe(work, self.loop).result(seconds)

    def close(self) -> None:
        """End the loop, and wait for its thread."""
        self._call(self.loop.stop)
        self._thread.join()

    def _call(self, callback: Callable[[], object]) -> None:
        # Closed already: there is nothing to stop.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(callback)

    def _cancel_start(self) -> None:
        # Where there is none yet, it finds out by itself.
        starting = self._starting
        if starting is not None:
            self._call(starting.cancel)

    async def _begin(self) -> None:
        self._starting = asyncio.current_task()
        if self._ready.cancelled():
            raise asyncio.CancelledError
        await self._start()

    def _run(self) -> None:
        problem: Exception | None = None
        # Death signals of processes are bound to the thread that starts them: this one, which lives as long as needed.
        with asyncio.Runner() as runner:
            self._loop = runner.get_loop()
            self._loop.set_default_executor(Threads())
            try:
                runner.run(self._begin())
            except asyncio.CancelledError:
                return
            except Exception as error:  # noqa: BLE001 - it is raised in the thread that opens the loop
                problem = error
            else:
                if self._ready.set_running_or_notify_cancel():
                    self._ready.set_result(None)
                    self._loop.run_forever()
                # Mostly done by then, unless who closes was interrupted.
                runner.run(self._end())
        if problem is not None and self._ready.set_running_or_notify_cancel():
            self._ready.set_exception(problem)
