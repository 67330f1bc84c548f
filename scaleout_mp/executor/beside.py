"""Work that blocks, beside the event loop; on it, where no thread can be had."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


async def beside(work: Callable[[], T]) -> T:
    """Return what `work` returns, called on a thread; it must bear being called twice, at once or later.

    A task that has taken all the processes that this user may have, threads among them, must not be safe for that from
    being watched and killed: then the loop waits.
    """
    try:
        return await asyncio.to_thread(work)
    except RuntimeError as error:
        # The only way to tell; the call is in the pool's queue by now all the same.
        if str(error) != "can't start new thread":
            raise
        return work()
