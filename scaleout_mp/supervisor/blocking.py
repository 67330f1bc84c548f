"""Run asyncio code from blocking code, also where a loop runs already, as in a notebook."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from scaleout_mp.executor.threads import Threads

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")


def _loop_runs_here() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _run(make: Callable[[], Coroutine[Any, Any, T]], loop_factory: Callable[[], asyncio.AbstractEventLoop] | None) -> T:
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        # A program's main thread may end while a client runs in another one.
        runner.get_loop().set_default_executor(Threads())
        return runner.run(make())


def run_blocking(
    make: Callable[[], Coroutine[Any, Any, T]],
    *,
    on_interrupt: Callable[[], None] | None = None,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> T:
    """Run a coroutine to its end on a loop of its own and return its result.

    In this thread, or, when a loop runs in it, in another one; there Ctrl-C calls `on_interrupt` instead of
    raising. `loop_factory` makes the loop, whose clock is that of all that waits; None: asyncio's own.
    """
    if not _loop_runs_here():
        return _run(make, loop_factory)
    result: concurrent.futures.Future[T] = concurrent.futures.Future()

    def work() -> None:
        try:
            result.set_result(_run(make, loop_factory))
        except BaseException as error:  # noqa: BLE001 - it is raised in the thread that waits
            result.set_exception(error)

    threading.Thread(target=work, name="scaleout_mp", daemon=True).start()
    while True:
        try:
            return result.result()
        except KeyboardInterrupt:
            if on_interrupt is None or result.done():
                raise
            on_interrupt()
