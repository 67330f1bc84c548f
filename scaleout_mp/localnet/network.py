"""A local Scaleout Edge network: REST API, combiner and sessions on one asyncio loop."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from scaleout_mp.errors import LocalNetworkError
from scaleout_mp.localnet.aggregation import helper_name
from scaleout_mp.localnet.combiner import Combiner
from scaleout_mp.localnet.event_log import EventLog
from scaleout_mp.localnet.faults import FaultPlan
from scaleout_mp.localnet.model_files import ModelFiles
from scaleout_mp.localnet.parts import NetworkParts
from scaleout_mp.localnet.registry import DEFAULT_LOST_AFTER, ClientInfo, ClientRegistry, ClientState
from scaleout_mp.localnet.rest import ANY_ADDRESS, RestApi
from scaleout_mp.localnet.session import Session, wait_for_clients
from scaleout_mp.localnet.tasks import IssuedTask, TaskBook
from scaleout_mp.localnet.tokens import DEFAULT_LIFETIME, LONG_LIFETIME, TokenKind, Tokens
from scaleout_mp.model import ScaleoutModel

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection, Mapping
    from types import TracebackType

    from scaleout_mp.localnet.certificates import ServerTls
    from scaleout_mp.localnet.events import Event
    from scaleout_mp.localnet.parts import Release
    from scaleout_mp.localnet.results import SessionPlan, SessionResult
    from scaleout_mp.wire import edge_pb2 as pb

logger = logging.getLogger(__name__)


class LocalNetwork:
    """A network for demos, development and tests, as an async context manager. It lives on the loop that starts it.

    In `folder`: `models/<id>.scm`, `rounds/0001.json`, ..., `sessions/<session id>.json`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        host: str = "127.0.0.1",
        api_port: int = 0,
        combiner_port: int = 0,
        token: str | None = None,
        auth: bool | None = None,
        token_lifetime: float = DEFAULT_LIFETIME,
        tls: ServerTls | None = None,
        wall_clock: Callable[[], float] = time.time,
        accepted_versions: Collection[str] | None = None,
        release: Release = "1.1",
        lost_after: float = DEFAULT_LOST_AFTER,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        """Prepare a network; `start` opens its ports (0: any free one).

        token: what clients must give as their token; None lets everybody in, unless `auth` is true.
        auth: whether clients must have a token at all; `issue_token` makes them.
        token_lifetime: seconds that an access token is good for.
        tls: certificates; without them neither API nor combiner speaks TLS.
        wall_clock: seconds since the epoch, by which tokens end.
        accepted_versions: client versions that may join; None accepts all.
        release: what the combiner speaks; "1.0" knows no call and no field that came later.
        lost_after: seconds of silence after which a client counts as lost and its tasks as failed.
        on_event: called on the loop with every event.
        """
        self.folder = Path(folder)
        self._host = host
        self._ports = (api_port, combiner_port)
        self.events = EventLog()
        if on_event is not None:
            self.events.subscribe(on_event)
        tokens = Tokens(token, required=auth, lifetime=token_lifetime, clock=wall_clock)
        self._parts = _parts(self.events, self.folder, tokens, lost_after=lost_after)
        #: Faults that the calls of the combiner and of the REST API are to have.
        self.faults = FaultPlan()
        self._tls = tls
        self._rest = RestApi(self._parts, faults=self.faults, accepted_versions=accepted_versions, tls=tls)
        self._combiner = Combiner(
            self._parts, faults=self.faults, accepted_versions=accepted_versions, tls=tls, release=release
        )
        self._watch: asyncio.Task[None] | None = None
        self._session: Session | None = None
        self._session_task: asyncio.Task[SessionResult] | None = None

    async def start(self) -> None:
        """Open the ports; LocalNetworkError when one is in use."""
        api_port, combiner_port = self._ports
        await self._combiner.start(host=self._host, port=combiner_port)
        try:
            await self._rest.start(
                host=self._host,
                port=api_port,
                combiner_host=self._host,
                combiner_port=self._combiner.port,
            )
        except BaseException:
            await self._combiner.aclose()
            raise
        self._watch = asyncio.create_task(self._watch_clients(), name="localnet-watch")
        logger.info(
            "local network at %s, combiner at %s",
            self.api_url,
            self.combiner_address,
            extra={"action": "localnet_started"},
        )

    async def aclose(self) -> None:
        """End the session, if one runs, and close the ports. Safe to call again."""
        for task in (self._session_task, self._watch):
            if task is not None and not task.done():
                task.cancel()
                await asyncio.wait({task})
        await self._rest.aclose()
        await self._combiner.aclose()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def set_package(self, archive: str | os.PathLike[str] | None) -> None:
        """Give clients that ask for one this archive of a compute package; None: there is none."""
        self._rest.package = None if archive is None else Path(archive)

    @property
    def api_url(self) -> str:
        """The URL that clients connect to."""
        host = "127.0.0.1" if self._host in ANY_ADDRESS else self._host
        return f"{'http' if self._tls is None else 'https'}://{host}:{self._rest.port}"

    @property
    def combiner_address(self) -> str:
        """Host and port of the combiner, as gRPC wants it."""
        host = "127.0.0.1" if self._host in ANY_ADDRESS else self._host
        return f"{host}:{self._combiner.port}"

    def issue_token(self, kind: TokenKind, *, client_id: str = "", lifetime: float = LONG_LIFETIME) -> str:
        """Return a new token to hand out, good for `lifetime` seconds."""
        return self._parts.tokens.issue(kind, client_id=client_id, lifetime=lifetime)

    def revoke_token(self, token: str) -> None:
        """Take a token back, and what came of it. Raises AuthenticationError when it is not ours."""
        self._parts.tokens.revoke(token)

    def clients(self) -> tuple[ClientInfo, ...]:
        """Return every client that ever came, as it is now."""
        return self._parts.registry.snapshot()

    async def wait_for_clients(self, count: int, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Wait until `count` clients are connected; LocalNetworkError after `timeout` seconds."""
        await wait_for_clients(self._parts, count, timeout)

    async def wait_for(self, accepts: Callable[[Event], bool], *, timeout: float) -> Event:  # noqa: ASYNC109
        """Wait for an event, a past one included; LocalNetworkError after `timeout` seconds."""
        return await self.events.wait(accepts, timeout=timeout)

    async def add_model(self, model: ScaleoutModel) -> str:
        """Keep a model for download; returns its id."""
        return await asyncio.to_thread(self._parts.models.put, model)

    def open_model(self, model_id: str) -> ScaleoutModel:
        """Open a model of the network in place."""
        if not self._parts.models.has(model_id):
            raise LocalNetworkError(f"there is no model {model_id}")
        return ScaleoutModel.from_file(self._parts.models.path(model_id))

    async def run_session(self, plan: SessionPlan, seed: ScaleoutModel) -> SessionResult:
        """Run a session from a seed model; one at a time. Cancelled: its tasks are interrupted."""
        if self._session_task is not None and not self._session_task.done():
            raise LocalNetworkError("a session is running already")
        seed_id = await self.add_model(seed)
        self._rest.helper_type = helper_name(seed)
        self._session = Session(self._parts, plan, folder=self.folder, seed_model_id=seed_id)
        self._session_task = asyncio.create_task(self._session.run(), name=f"localnet-session-{plan.session_id}")
        try:
            return await self._session_task
        finally:
            if not self._session_task.done():
                self._session_task.cancel()
            self._session = None

    async def abort_session(self) -> bool:
        """End the running session; its tasks are interrupted. False when none runs."""
        task = self._session_task
        if task is None or task.done():
            return False
        task.cancel()
        await asyncio.wait({task})
        return True

    def abort_round(self) -> bool:
        """End the current round; the session goes on with the next one. False when none runs."""
        return self._session is not None and self._session.abort_round()

    async def issue(
        self, client_id: str, task_type: str, *, model_id: str = "", data: Mapping[str, Any] | None = None
    ) -> IssuedTask:
        """Give one client a task outside of any session; `data` is sent as JSON: {"parameters": {...}} for example."""
        return self._parts.book.issue(client_id, task_type, model_id=model_id, data=data)

    def abort_task(self, correlation_id: str, *, status: str = "INTERRUPTED") -> bool:
        """Ask for a task's end, with status INTERRUPTED or TIMEOUT; False when it is over or unknown."""
        task = self._parts.book.get(correlation_id)
        if task is None or task.ended.done():
            return False
        self._parts.book.interrupt(task, status)
        return True

    def push_directive(self, client_id: str, request: pb.TaskRequest) -> None:
        """Put a request as it is into the answer to a client's next poll. For tests of clients."""
        self._parts.book.push(client_id, request)

    async def stop_combiner(self) -> None:
        """Close the combiner's port, as in an outage; the rest of the network goes on."""
        await self._combiner.aclose()

    async def restart_combiner(self) -> None:
        """Open the combiner's port again, the same one."""
        self._parts.registry.forgive()
        await self._combiner.start(host=self._host, port=self._combiner.port)

    async def restart_often(self, *, every: float, down: float) -> None:
        """Take the combiner away for `down` seconds, again and again, `every` seconds after it came. For ever."""
        while True:
            await asyncio.sleep(every)
            await self.stop_combiner()
            try:
                await asyncio.sleep(down)
            finally:
                await self.restart_combiner()

    async def _watch_clients(self) -> None:
        while True:
            registry = self._parts.registry
            wait = registry.expire() if self._combiner.serving else registry.lost_after / 4
            await asyncio.sleep(max(0.05, wait))


def _parts(log: EventLog, folder: Path, tokens: Tokens, *, lost_after: float) -> NetworkParts:
    book = TaskBook(log)
    registry = ClientRegistry(
        log, lost_after=lost_after, on_gone=lambda client_id, state: book.client_gone(client_id, _GONE[state])
    )
    return NetworkParts(log=log, registry=registry, book=book, models=ModelFiles(folder / "models"), tokens=tokens)


_GONE: Mapping[ClientState, str] = {
    ClientState.DISCONNECTED: "the client disconnected",
    ClientState.LOST: "the client was lost",
}
