"""The record of a local network's events: subscribe to it, search it, wait on it."""

from __future__ import annotations

import asyncio
import collections
import datetime as dt
import itertools
import logging
import threading
import time
from typing import TYPE_CHECKING, Final, TypeVar

from scaleout_mp.errors import LocalNetworkError
from scaleout_mp.localnet.events import ClientEvent, Event

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

E = TypeVar("E", bound=Event)
C = TypeVar("C", bound=ClientEvent)

#: Older events are forgotten beyond this many.
DEFAULT_KEEP: Final = 200_000


class EventLog:
    """Events in the order in which they happened. Every method may be called from any thread."""

    def __init__(self, *, keep: int = DEFAULT_KEEP) -> None:
        self._events: collections.deque[Event] = collections.deque(maxlen=keep)
        self._lock = threading.Lock()
        self._subscribers: list[Callable[[Event], None]] = []

    def emit(self, event: Event) -> None:
        """Record an event and tell everyone who subscribed or waits. Called by the network's own parts."""
        with self._lock:
            self._events.append(event)
            subscribers = tuple(self._subscribers)
        logger.debug("%s", event, extra={"action": "localnet_event"})
        for subscriber in subscribers:
            try:
                subscriber(event)
            except Exception:
                # A broken listener must not stop the network that it listens to.
                logger.exception("a listener of the local network failed", extra={"action": "listener_failed"})

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call `callback` with every event from now on, in the network's thread; returns what ends that."""
        with self._lock:
            self._subscribers.append(callback)

        def unsubscribe() -> None:
            with self._lock:
                if callback in self._subscribers:
                    self._subscribers.remove(callback)

        return unsubscribe

    def __len__(self) -> int:
        return len(self._events)

    def all(self) -> list[Event]:
        """Return every event so far."""
        with self._lock:
            return list(self._events)

    def of(self, kind: type[E], where: Callable[[E], bool] | None = None) -> list[E]:
        """Return the events of one kind so far, those that `where` accepts."""
        return [event for event in self.all() if isinstance(event, kind) and (where is None or where(event))]

    def lines(self) -> list[str]:
        """Return one line with the time of day for every event that people want to see."""
        return [format_line(event) for event in self.all() if event.printed]

    def largest_gap(self, kind: type[C], client_id: str) -> float:
        """Return the longest time in seconds between two events of one kind from one client; 0.0 if under two came."""
        times = [event.monotonic for event in self.of(kind, lambda event: event.client_id == client_id)]
        return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)

    def wait_for(self, accepts: Callable[[Event], bool], *, timeout: float) -> Event:
        """Block until an event, a past one included, is accepted, and return it.

        Raises LocalNetworkError, with the last lines, after `timeout` seconds. Not for the network's own thread.
        """
        deadline = time.monotonic() + timeout
        found: list[Event] = []
        arrived = threading.Event()

        def look(event: Event) -> None:
            if not found and accepts(event):
                found.append(event)
                arrived.set()

        # Subscribed first, so that nothing falls between the past and the future; a double look is harmless.
        unsubscribe = self.subscribe(look)
        try:
            past = next((event for event in self.all() if accepts(event)), None)
            if past is not None:
                return past
            if not arrived.wait(max(0.0, deadline - time.monotonic())):
                raise self._nothing_came(timeout)
            return found[0]
        finally:
            unsubscribe()

    async def wait(self, accepts: Callable[[Event], bool], *, timeout: float) -> Event:  # noqa: ASYNC109 - symmetric
        """Do what `wait_for` does without blocking the loop."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Event] = loop.create_future()

        def settle(event: Event) -> None:
            if not future.done():
                future.set_result(event)

        def look(event: Event) -> None:
            if accepts(event):
                loop.call_soon_threadsafe(settle, event)

        unsubscribe = self.subscribe(look)
        try:
            past = next((event for event in self.all() if accepts(event)), None)
            if past is not None:
                return past
            return await asyncio.wait_for(future, timeout)
        except TimeoutError:
            raise self._nothing_came(timeout) from None
        finally:
            unsubscribe()

    def _nothing_came(self, timeout: float) -> LocalNetworkError:
        last = "\n".join(self.lines()[-12:]) or "(nothing happened)"
        return LocalNetworkError(f"no such event within {timeout:g} s; the last ones were:\n{last}")


def format_line(event: Event) -> str:
    """Return the event as a line with its local time of day."""
    when = dt.datetime.fromtimestamp(event.wall, tz=dt.UTC).astimezone()
    return f"{when:%H:%M:%S} {event}"
