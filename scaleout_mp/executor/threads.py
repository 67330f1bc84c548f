"""Threads for work that would block an event loop, to the program's very end."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import queue
import threading
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")


class Threads(concurrent.futures.ThreadPoolExecutor):
    """A pool that takes work after the main thread has ended: others may go on, and then exit handlers come.

    Those of the standard library refuse it then, and with them asyncio's own. The name of the base is all that is used
    of it: asyncio asks for it. From CPython 3.12 on, exit handlers can start no threads; when there is none, what they
    submit is done before `submit` returns.
    """

    def __init__(self, most: int | None = None, *, name: str = "scaleout") -> None:
        """Have at most so many threads; None: as many as asyncio would."""
        self._most = most or min(32, (os.cpu_count() or 1) + 4)
        super().__init__(self._most, thread_name_prefix=name)
        self._name = name
        #: What no thread was free for; None: the one that takes it ends.
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        #: One for each thread that waits for an order.
        self._free = threading.Semaphore(0)
        self._made: list[threading.Thread] = []
        self._guard = threading.Lock()
        self._over = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[T]:
        """Have a thread call `fn`. Raises RuntimeError after `shutdown`."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        order = functools.partial(_do, future, functools.partial(fn, *args, **kwargs))
        if not self._hand_over(order):
            order()
        return future

    def _hand_over(self, order: Callable[[], None]) -> bool:
        with self._guard:
            if self._over:
                raise RuntimeError("these threads take no more work")
            if not self._free.acquire(blocking=False) and len(self._made) < self._most and self._start(order):
                return True
            if self._made:
                self._orders.put(order)
            return bool(self._made)

    def _start(self, order: Callable[[], None]) -> bool:
        thread = threading.Thread(
            target=self._serve, args=(order,), name=f"{self._name}_{len(self._made)}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            # There are too many, or the interpreter is about to end: those that were made have to do.
            return False
        self._made.append(thread)
        return True

    def _serve(self, order: Callable[[], None] | None) -> None:
        while order is not None:
            order()
            # What it holds must not live until there is another.
            order = None
            try:
                order = self._orders.get_nowait()
            except queue.Empty:
                self._free.release()
                order = self._orders.get()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Have the threads end once they have done what was submitted. Nothing is cancelled."""
        del cancel_futures
        with self._guard:
            self._over = True
        for _ in self._made:
            self._orders.put(None)
        for thread in self._made if wait else ():
            # One of them may be the caller.
            with contextlib.suppress(RuntimeError):
                thread.join()


def _do(future: concurrent.futures.Future[Any], work: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001 - it is raised where the result is waited for
        future.set_exception(error)
