"""Do something at an even rhythm, whatever it takes each time."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from scaleout_mp.errors import TransportError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from scaleout_mp.transport.calls import CombinerCalls

logger = logging.getLogger(__name__)


async def keep_calling(
    what: str, interval: float | Callable[[], float], act: Callable[[], Awaitable[None]], calls: CombinerCalls
) -> None:
    """Await `act()` every `interval` seconds, start to start, for ever; a function is asked anew each time.

    No failure ends the loop: the next attempt comes after a backoff that starts well below the interval of a healthy
    link, so that an outage is not prolonged, and grows, so that a server in trouble is left in peace.
    """
    loop = asyncio.get_running_loop()
    failures = 0
    while True:
        due = loop.time() + (interval() if callable(interval) else interval)
        try:
            await act()
            failures = 0
        except TransportError as error:
            failures += 1
            wait = calls.delay(failures)
            due = loop.time() + wait
            calls.link.failed(what, error, wait)
        except Exception:
            # A bug of ours, or an answer that nobody thought of: the client must not fall silent for it.
            failures += 1
            wait = calls.delay(failures)
            due = loop.time() + wait
            logger.exception("%s failed; trying again in %.1f s", what, wait, extra={"action": "loop_bug"})
        await asyncio.sleep(due - loop.time())
