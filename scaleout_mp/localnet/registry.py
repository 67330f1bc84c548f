"""The clients of a local network: who they are and when they were last heard of."""

from __future__ import annotations

import dataclasses
import enum
import time
from typing import TYPE_CHECKING, Final

from scaleout_mp.localnet.events import ClientConnected, ClientDisconnected

if TYPE_CHECKING:
    from collections.abc import Callable

    from scaleout_mp.localnet.event_log import EventLog

#: Seconds without a sign of life after which a client counts as lost: several times the usual polling interval of 5 s.
DEFAULT_LOST_AFTER: Final = 30.0


class ClientState(enum.StrEnum):
    """Where a client is in its life."""

    #: The REST API gave it its combiner; it has not called yet.
    ASSIGNED = "assigned"
    #: It announced itself or polls.
    CONNECTED = "connected"
    #: It said goodbye.
    DISCONNECTED = "disconnected"
    #: It was not heard of for too long.
    LOST = "lost"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientInfo:
    """What the network knows of one client at one moment."""

    client_id: str
    name: str
    state: ClientState
    #: The version that it presented; empty when it presented none.
    version: str
    #: time.monotonic() of its last call.
    last_seen: float

    @property
    def connected(self) -> bool:
        """Whether it takes tasks."""
        return self.state is ClientState.CONNECTED


class ClientRegistry:
    """Keeps the clients. Lives on the network's loop."""

    def __init__(
        self,
        log: EventLog,
        *,
        lost_after: float = DEFAULT_LOST_AFTER,
        clock: Callable[[], float] = time.monotonic,
        on_gone: Callable[[str, ClientState], None] = lambda _client_id, _state: None,
    ) -> None:
        """Call `on_gone` when a client says goodbye or is lost."""
        self.lost_after = lost_after
        self._log = log
        self._clock = clock
        self._on_gone = on_gone
        self._clients: dict[str, ClientInfo] = {}

    def snapshot(self) -> tuple[ClientInfo, ...]:
        """Return all clients that ever came, in the order of their coming."""
        return tuple(self._clients.values())

    def connected(self) -> tuple[ClientInfo, ...]:
        """Return the clients that take tasks."""
        return tuple(client for client in self._clients.values() if client.connected)

    def get(self, client_id: str) -> ClientInfo | None:
        """Return one client."""
        return self._clients.get(client_id)

    def assign(self, client_id: str, *, name: str, version: str) -> None:
        """Note that the REST API let a client in."""
        self._clients[client_id] = ClientInfo(
            client_id=client_id,
            name=name,
            state=ClientState.ASSIGNED,
            version=version,
            last_seen=self._clock(),
        )

    def seen(self, client_id: str) -> None:
        """Note a sign of life from a client that is connected already."""
        client = self._clients.get(client_id)
        if client is not None:
            self._clients[client_id] = dataclasses.replace(client, last_seen=self._clock())

    def polls(self, client_id: str, *, name: str = "") -> bool:
        """Note a poll; returns whether the client takes tasks.

        A poll connects, because announcements are optional. Not after a goodbye: a published client's polling thread
        may outlive its Disconnect by a poll, and a task given then would be lost.
        """
        client = self._clients.get(client_id)
        if client is not None and client.state is ClientState.DISCONNECTED:
            return False
        self.connect(client_id, name=name)
        return True

    def connect(self, client_id: str, *, name: str = "") -> None:
        """Note that a client is there: it announced itself or listens for tasks."""
        client = self._clients.get(client_id)
        if client is None:
            client = ClientInfo(
                client_id=client_id,
                name=name or client_id,
                state=ClientState.ASSIGNED,
                version="",
                last_seen=self._clock(),
            )
        arrives = not client.connected
        self._clients[client_id] = dataclasses.replace(client, state=ClientState.CONNECTED, last_seen=self._clock())
        if arrives:
            self._log.emit(ClientConnected(client_id=client_id, name=client.name))

    def disconnect(self, client_id: str) -> None:
        """Note that a client said goodbye."""
        self._leave(client_id, ClientState.DISCONNECTED)

    def forgive(self) -> None:
        """Count the silence of connected clients anew: it was the network that could not be reached."""
        for client in self.connected():
            self.seen(client.client_id)

    def expire(self) -> float:
        """Mark the clients that were silent for too long as lost; returns the seconds until the next could be."""
        now = self._clock()
        for client in self.connected():
            if now - client.last_seen >= self.lost_after:
                self._leave(client.client_id, ClientState.LOST)
        waits = [client.last_seen + self.lost_after - now for client in self.connected()]
        return min(waits, default=self.lost_after)

    def _leave(self, client_id: str, state: ClientState) -> None:
        client = self._clients.get(client_id)
        if client is None or not client.connected:
            return
        self._clients[client_id] = dataclasses.replace(client, state=state)
        self._log.emit(ClientDisconnected(client_id=client_id, name=client.name, lost=state is ClientState.LOST))
        self._on_gone(client_id, state)
