"""A local network in a thread of its own, for code that is not asynchronous: tests, scripts, notebooks."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from typing import TYPE_CHECKING, Any, Self, TypeVar

from scaleout_mp.errors import LocalNetworkError
from scaleout_mp.localnet.network import LocalNetwork
from scaleout_mp.localnet.tokens import LONG_LIFETIME, TokenKind

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Coroutine, Mapping
    from types import TracebackType

    from scaleout_mp.localnet.event_log import EventLog
    from scaleout_mp.localnet.events import Event
    from scaleout_mp.localnet.faults import FaultPlan
    from scaleout_mp.localnet.registry import ClientInfo
    from scaleout_mp.localnet.results import SessionPlan, SessionResult
    from scaleout_mp.localnet.tasks import IssuedTask, TaskOutcome
    from scaleout_mp.model import ScaleoutModel
    from scaleout_mp.wire import edge_pb2 as pb

T = TypeVar("T")


class ThreadIssuedTask:
    """A single task that was issued from outside the network's thread."""

    def __init__(self, network: LocalNetworkThread, task: IssuedTask) -> None:
        self._network = network
        self._task = task
        self.correlation_id = task.correlation_id
        self.client_id = task.client_id

    @property
    def status(self) -> str:
        """The status that was reported last."""
        return self._task.status

    def done(self, timeout: float) -> TaskOutcome:
        """Block until the task ends; LocalNetworkError after `timeout` seconds."""
        return self._network.call(self._task.done(timeout))

    def abort(self, *, status: str = "INTERRUPTED") -> bool:
        """Ask for the task's end, with status INTERRUPTED or TIMEOUT; False when it is over."""
        return self._network.abort_task(self.correlation_id, status=status)


class LocalNetworkThread:
    """`LocalNetwork` without asyncio: the same methods, blocking. A context manager; every method from any thread."""

    def __init__(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Take the arguments of `LocalNetwork`."""
        self._folder = folder
        self._options = options
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._network: LocalNetwork | None = None

    def start(self) -> None:
        """Start the network; raises what kept it from starting."""
        if self._thread is not None:
            raise LocalNetworkError("the local network was started already")
        started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._main(started)), name="scaleout-localnet", daemon=True
        )
        self._thread.start()
        try:
            started.result()
        except BaseException:
            self._thread.join()
            self._thread = None
            raise

    async def _main(self, started: concurrent.futures.Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        try:
            self._network = LocalNetwork(self._folder, **self._options)
            await self._network.start()
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits in start()
            started.set_exception(error)
            return
        started.set_result(None)
        try:
            await self._stop.wait()
        finally:
            await self._network.aclose()

    def close(self) -> None:
        """End the session, if one runs, close the ports and end the thread. Safe to call again."""
        thread, self._thread = self._thread, None
        if thread is None or self._loop is None or self._stop is None:
            return
        self._loop.call_soon_threadsafe(self._stop.set)
        thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run a coroutine on the network's loop and return its result."""
        return self.submit(coroutine).result(timeout)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start a coroutine on the network's loop; cancelling the future cancels it."""
        if self._thread is None or self._loop is None:
            coroutine.close()
            raise LocalNetworkError("the local network does not run")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _run(self, function: Callable[[], T]) -> T:
        async def call() -> T:
            return function()

        return self.call(call())

    @property
    def network(self) -> LocalNetwork:
        """The network itself; its coroutines go through `call`."""
        if self._network is None:
            raise LocalNetworkError("the local network was not started")
        return self._network

    @property
    def events(self) -> EventLog:
        """The record of all events."""
        return self.network.events

    @property
    def api_url(self) -> str:
        """The URL that clients connect to."""
        return self.network.api_url

    @property
    def combiner_address(self) -> str:
        """Host and port of the combiner, as gRPC wants it."""
        return self.network.combiner_address

    @property
    def faults(self) -> FaultPlan:
        """Faults that the calls of the combiner and of the REST API are to have."""
        return self.network.faults

    def issue_token(self, kind: TokenKind, *, client_id: str = "", lifetime: float = LONG_LIFETIME) -> str:
        """Return a new token to hand out, good for `lifetime` seconds."""
        return self._run(lambda: self.network.issue_token(kind, client_id=client_id, lifetime=lifetime))

    def revoke_token(self, token: str) -> None:
        """Take a token back, and what came of it. Raises AuthenticationError when it is not ours."""
        self._run(lambda: self.network.revoke_token(token))

    def lines(self) -> list[str]:
        """Return one line for every event that people want to see."""
        return self.events.lines()

    def wait_for(self, accepts: Callable[[Event], bool], *, timeout: float) -> Event:
        """Block until an event, a past one included, is accepted; LocalNetworkError after `timeout` seconds."""
        return self.events.wait_for(accepts, timeout=timeout)

    def clients(self) -> tuple[ClientInfo, ...]:
        """Return every client that ever came, as it is now."""
        return self._run(self.network.clients)

    def wait_for_clients(self, count: int, timeout: float) -> None:
        """Block until `count` clients are connected; LocalNetworkError after `timeout` seconds."""
        self.call(self.network.wait_for_clients(count, timeout))

    def run_session(self, plan: SessionPlan, seed: ScaleoutModel, *, timeout: float | None = None) -> SessionResult:
        """Run a session to its end; LocalNetworkError, and the session is aborted, after `timeout` seconds."""
        future = self.start_session(plan, seed)
        try:
            return future.result(timeout)
        except concurrent.futures.TimeoutError:
            self.abort_session()
            last = "\n".join(self.lines()[-12:])
            raise LocalNetworkError(f"the session did not end within {timeout:g} s; last events:\n{last}") from None

    def start_session(self, plan: SessionPlan, seed: ScaleoutModel) -> concurrent.futures.Future[SessionResult]:
        """Start a session; the future has its result."""
        return self.submit(self.network.run_session(plan, seed))

    def abort_session(self) -> bool:
        """End the running session; False when none runs."""
        return self.call(self.network.abort_session())

    def abort_round(self) -> bool:
        """End the current round; False when none runs."""
        return self._run(self.network.abort_round)

    def set_package(self, archive: str | os.PathLike[str] | None) -> None:
        """Give clients that ask for one this archive of a compute package; None: there is none."""
        self._run(lambda: self.network.set_package(archive))

    def add_model(self, model: ScaleoutModel) -> str:
        """Keep a model for download; returns its id."""
        return self.call(self.network.add_model(model))

    def open_model(self, model_id: str) -> ScaleoutModel:
        """Open a model of the network in place."""
        return self.network.open_model(model_id)

    def issue(
        self, client_id: str, task_type: str, *, model_id: str = "", data: Mapping[str, Any] | None = None
    ) -> ThreadIssuedTask:
        """Give one client a task outside of any session."""
        task = self.call(self.network.issue(client_id, task_type, model_id=model_id, data=data))
        return ThreadIssuedTask(self, task)

    def abort_task(self, correlation_id: str, *, status: str = "INTERRUPTED") -> bool:
        """Ask for a task's end, with status INTERRUPTED or TIMEOUT; False when it is over or unknown."""
        return self._run(lambda: self.network.abort_task(correlation_id, status=status))

    def push_directive(self, client_id: str, request: pb.TaskRequest) -> None:
        """Put a request as it is into the answer to a client's next poll. For tests of clients."""
        self._run(lambda: self.network.push_directive(client_id, request))

    def stop_combiner(self) -> None:
        """Close the combiner's port, as in an outage."""
        self.call(self.network.stop_combiner())

    def restart_combiner(self) -> None:
        """Open the combiner's port again, the same one."""
        self.call(self.network.restart_combiner())
