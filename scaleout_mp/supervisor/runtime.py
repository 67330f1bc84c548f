"""GrpcEdgeClientRuntime: what connects an EdgeClient to a network, as blocking code sees it."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import os
import signal
import threading
from typing import TYPE_CHECKING, Any, Final, Literal

from scaleout_mp.client import published
from scaleout_mp.client.calls import AutonomousCall
from scaleout_mp.client.values import callback_name
from scaleout_mp.config import Limits, Resources, Sandbox, Settings, Surroundings
from scaleout_mp.errors import (
    AuthenticationError,
    CallbackNotSendable,
    ConfigError,
    StateError,
    TransportError,
)
from scaleout_mp.executor import ExecutorCore
from scaleout_mp.executor.residents import IDLE_SECONDS
from scaleout_mp.executor.states import MAX_STATE
from scaleout_mp.supervisor import connecting, messages, restart
from scaleout_mp.supervisor.autonomous import AutonomousJob, AutonomousTask, OwnTaskOrder
from scaleout_mp.supervisor.blocking import run_blocking
from scaleout_mp.supervisor.connection import Connection
from scaleout_mp.supervisor.farewell import LAST_WORDS
from scaleout_mp.supervisor.inference_runtime import InferenceRuntime
from scaleout_mp.supervisor.record_runtime import RecordRuntime
from scaleout_mp.supervisor.service import ABORTED_BY_CLIENT, ClientService
from scaleout_mp.supervisor.service_plan import ClientOptions, ServicePlan
from scaleout_mp.supervisor.snapshot import ClientSnapshot
from scaleout_mp.supervisor.state import opened_state
from scaleout_mp.task import (
    AbortOrigin,
    Record,
    require_not_loading,
)

if TYPE_CHECKING:
    import types
    from collections.abc import Callable, Mapping, Sequence

    from google.protobuf.message import Message

    from scaleout_mp.client import ConnectToApiResult, EdgeClient, GrpcConnectionOptions
    from scaleout_mp.config.sandbox import LevelName
    from scaleout_mp.executor.worker_handle import Isolation
    from scaleout_mp.model import ScaleoutModel
    from scaleout_mp.supervisor.jobs import Job
    from scaleout_mp.supervisor.package_callbacks import PackageSource
    from scaleout_mp.supervisor.state import StateFolder
    from scaleout_mp.transport.link_quality import LinkState
    from scaleout_mp.transport.message import MessageKind
    from scaleout_mp.transport.signatures import TrustedSigners

logger = logging.getLogger(__name__)

#: What a program may log before `run`; more is refused.
_MAX_EARLY: Final = 10_000


class GrpcEdgeClientRuntime(InferenceRuntime, RecordRuntime):
    """Connects a client over REST and gRPC and runs its tasks in processes of their own.

    `connect_to_api`, `init_grpchandler` and `run` block. `stop`, `abort_task`, `snapshot` and the `send_`
    methods may be called from any thread.

    `limits` and `resources` are those of each task. `isolation`: "task", a fresh process for each, or "worker", one
    process that keeps what the callbacks keep, see docs/isolation.md. `state_bytes` bounds `client.state` of each
    callback. `max_concurrent_tasks`: as many as there are processors, at least four. `heartbeat_interval` is in
    seconds. `echo_output` shows what tasks print. `memory_budget`, `gpus`, `scratch_folder`, `working_directory`,
    `environment`, `pass_environment` and `shield` are as for TaskExecutor. `state_dir` is the folder below which
    the client keeps what must reach the server; ":memory:" for none, as in a notebook. `package` is a compute
    package, such as LocalPackage; its callbacks take the place of those that are set on the client.
    `goodbye_seconds` is how long, at the end, the client tries to get rid of what waits for the server.
    `trusted_signers` says whose signature a model needs before a task gets it. `inference_concurrency` requests to
    one staged model run at once, `inference_limits` are those of each (default: `limits`), and its processes end
    after `inference_idle_time` without one, in seconds or as "10m"; None: never.
    """

    def __init__(
        self,
        client: EdgeClient | None = None,
        *,
        limits: Limits | None = None,
        start_method: Literal["template", "spawn"] = "template",
        sandbox: Sandbox | LevelName = "auto",
        isolation: Isolation = "task",
        state_bytes: int | str = MAX_STATE,
        memory_budget: float | str | None = None,
        gpus: Sequence[int | str] | None = None,
        resources: Resources | None = None,
        settings: Settings | None = None,
        max_concurrent_tasks: int | None = None,
        heartbeat_interval: float | str = 2.0,
        echo_output: bool = True,
        scratch_folder: str | os.PathLike[str] | None = None,
        working_directory: str | os.PathLike[str] | None = None,
        environment: Mapping[str, str] | None = None,
        pass_environment: Sequence[str] = (),
        shield: bool = True,
        state_dir: str | os.PathLike[str] | None = None,
        package: PackageSource | None = None,
        goodbye_seconds: float | str = LAST_WORDS,
        trusted_signers: TrustedSigners | None = None,
        inference_concurrency: int = 1,
        inference_idle_time: float | str | None = IDLE_SECONDS,
        inference_limits: Limits | None = None,
    ) -> None:
        """Read what is not given from the environment. Raises ConfigError that names the field."""
        self.settings = settings or Settings.from_environ()
        self._plan_options = ClientOptions.checked(
            settings=self.settings,
            limits=limits,
            start_method=start_method,
            sandbox=sandbox,
            isolation=isolation,
            state_bytes=state_bytes,
            memory_budget=memory_budget,
            gpus=gpus,
            resources=resources,
            max_concurrent_tasks=max_concurrent_tasks,
            heartbeat_interval=heartbeat_interval,
            echo_output=echo_output,
            surroundings=Surroundings(
                scratch_folder=scratch_folder,
                working_directory=working_directory,
                environment={} if environment is None else environment,
                pass_environment=pass_environment,
                shield=shield,
            ),
            goodbye_seconds=goodbye_seconds,
            inference_concurrency=inference_concurrency,
            inference_idle_time=inference_idle_time,
            inference_limits=inference_limits,
            package=package,
        )
        self.limits = self._plan_options.limits
        self._client = client
        self._state_dir = self.settings.state_dir if state_dir is None else os.fspath(state_dir)
        self._connection = Connection(
            self.settings,
            signers=trusted_signers or connecting.signers_of(self.settings),
            state_dir=self._state_dir,
        )
        self._moments = messages.Moments()
        # Guards what other threads touch while `run` comes and goes.
        self._lock = threading.Lock()
        self._running = False
        self._stop_asked = False
        self._at_work: tuple[asyncio.AbstractEventLoop, ClientService] | None = None
        #: Makes the loop of `run`, and with it the clock by which everything waits; None: asyncio's own.
        self._loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
        self._early: list[tuple[MessageKind, Message]] = []
        self._own_early: list[OwnTaskOrder] = []
        super().__init__()

    def set_client(self, client: EdgeClient) -> None:
        """Serve this client. Called by EdgeClient when it gets this runtime."""
        self._client = client
        published.adopt(client)

    @property
    def client(self) -> EdgeClient:
        """The client that is served."""
        if self._client is None:
            self._find_client()
        if self._client is None:
            raise ConfigError("this runtime has no client: pass it to EdgeClient(runtime=...)")
        return self._client

    def _find_client(self) -> None:
        """Find the client of release 1.0.7, which does not introduce itself, among those who are calling."""
        frame: types.FrameType | None = inspect.currentframe()
        while frame is not None:
            caller = frame.f_locals.get("self")
            if getattr(caller, "_runtime", None) is self:
                self.set_client(caller)
                return
            frame = frame.f_back

    # Connecting

    def connect_to_api(
        self,
        url: str,
        json: dict[str, Any] | None = None,
        token: str | None = None,
        token_refresh_callback: Callable[..., None] | None = None,
    ) -> tuple[ConnectToApiResult, Any]:
        """Ask the REST API for a combiner; see EdgeClient."""
        require_not_loading("connects a client")
        return self._connection.ask_api(self.client, url, json, token, token_refresh_callback)

    def init_grpchandler(
        self,
        config: GrpcConnectionOptions,
        token: str | None = None,
        url: str | None = None,
        token_refresh_callback: Callable[..., None] | None = None,
    ) -> bool:
        """Keep where the combiner is and ask it whether it takes this client; see EdgeClient."""
        try:
            self.use_combiner(config, token, url, token_refresh_callback)
        except TransportError as error:
            logger.error("%s", error, extra={"action": "init_failed"})  # noqa: TRY400 - the line says it all
            return False
        return True

    def use_combiner(
        self,
        config: GrpcConnectionOptions,
        token: str | None = None,
        url: str | None = None,
        token_refresh_callback: Callable[..., None] | None = None,
    ) -> None:
        """Do as `init_grpchandler`; TransportError says, in one line, which combiner will not do and why."""
        self._connection.ask_combiner(self.client, config, token, url, token_refresh_callback)

    def get_access_token(self) -> str | None:
        """Return the access token that is in use, refreshed where needed; None without one."""
        return self._connection.access_token()

    # Running

    def run(self, with_heartbeat: bool = False, with_polling: bool = True) -> None:
        """Serve tasks until SIGTERM, Ctrl-C or `stop`; returns once every task is gone and reported.

        Without polling, tasks come by the server's task stream, and ends are only told by status messages.
        When the server ordered a restart, it does not return: the program is started anew in this process.
        Raises NotConnectedError before `init_grpchandler`, ConfigError when no callback is registered,
        CallbackNotSendable, StateInUseError when another client with this id runs on this machine, StateError when the
        folder that was asked for cannot be used, and AuthenticationError when the combiner refuses the client at the
        start.
        """
        require_not_loading("runs a client")
        network = self._connection.require_network()
        client = self.client
        if not client.client_id:
            raise ConfigError("the client has no id: call connect_to_api or set_client_id before run")
        plan = self._plan(with_heartbeat=with_heartbeat, with_polling=with_polling)
        with self._lock:
            if self._running:
                raise RuntimeError("this client runs already")
            self._running = True
        try:
            # Not two executors that know nothing of each other's share of the machine.
            self._inference.close()
            with opened_state(client.client_id, network, root=self._state_dir) as state:
                restarts = run_blocking(
                    lambda: self._main(plan, client, state),
                    on_interrupt=self._interrupt,
                    loop_factory=self._loop_factory,
                )
        except (ConfigError, CallbackNotSendable, AuthenticationError, StateError) as error:
            # The user's mistake, told in its last line: our own frames below this one would only bury it.
            raise error.with_traceback(None) from None
        finally:
            with self._lock:
                self._running = self._stop_asked = False
        if restarts:
            restart.replace_program()

    def _plan(self, *, with_heartbeat: bool = False, with_polling: bool = False) -> ServicePlan:
        client = self.client
        return ServicePlan(
            **vars(self._plan_options),
            client_id=client.client_id or "",
            name=client.name or client.client_id or "",
            with_heartbeat=with_heartbeat,
            with_polling=with_polling,
            cannot_restart=restart.why_not(),
            make_transfer=self._connection.make_transfer,
        )

    async def _main(self, plan: ServicePlan, client: EdgeClient, state: StateFolder | None) -> bool:
        """Serve, and return whether the program is to be started anew."""
        service = ClientService(plan, client, self._connection.open_calls(client), state)
        with self._lock:
            self._at_work = asyncio.get_running_loop(), service
            early, self._early = self._early, []
            own_early, self._own_early = self._own_early, []
            if self._stop_asked:
                service.stop()
        try:
            await service.run(early, own_early)
        finally:
            with self._lock:
                self._at_work = None
        return service.restarts

    def _on_loop(self, act: Callable[[ClientService], object]) -> bool:
        """Have the service do something on its loop; False when none is at work."""
        with self._lock:
            if self._at_work is None:
                return False
            loop, service = self._at_work
            loop.call_soon_threadsafe(act, service)
            return True

    def _service_at_work(self) -> tuple[asyncio.AbstractEventLoop, ClientService] | None:
        with self._lock:
            return self._at_work

    def stop(self) -> None:
        """End `run` like SIGTERM does; a second call ends it at once. Does nothing when it does not run."""
        if not self._on_loop(ClientService.stop):
            with self._lock:
                self._stop_asked = self._running

    def _interrupt(self) -> None:
        self._on_loop(lambda service: service.on_signal(signal.SIGINT))

    def abort_task(self, correlation_id: str, reason: str = ABORTED_BY_CLIENT) -> bool:
        """Ask one task to end; False when the client does not run. The server hears INTERRUPTED."""
        return self._on_loop(lambda service: service.abort_task(correlation_id, AbortOrigin.CLIENT, reason))

    def snapshot(self) -> ClientSnapshot:
        """Return what is to be seen of the client now; without tasks when it does not run."""
        with self._lock:
            at_work = self._at_work
        if at_work is not None:
            return at_work[1].snapshot()
        return ClientSnapshot(
            name=self.client.name or "",
            client_id=self.client.client_id or "",
            connected=False,
            pending_messages=len(self._early),
        )

    # Tasks of the client's own

    def start_autonomous_task(
        self, callback: Callable[[], Any], command_type: str, parameters: Mapping[str, Any] | None
    ) -> AutonomousTask:
        """Start a task by oneself; see EdgeClient. Raises CallbackNotSendable, NotConnectedError, TypeError."""
        call = ExecutorCore.prepare(AutonomousCall(callback))
        make = functools.partial(AutonomousJob, call=call, name=callback_name(callback))
        return self.start_own_task(AutonomousTask(command_type, parameters), make)

    def start_own_task(self, task: AutonomousTask, make: Callable[..., Job]) -> AutonomousTask:
        """Have the job that `make(request, resources, on_start=...)` returns done as a task of the client's own.

        It begins once the client runs. Raises NotConnectedError before `init_grpchandler`.
        """
        self._connection.require_options()
        order = OwnTaskOrder(task=task, make=make)
        if not self._on_loop(lambda service: service.start_own(order)):
            with self._lock:
                self._own_early.append(order)
        return task

    @property
    def link_quality(self) -> LinkState:
        """How good the link to the combiner is."""
        return self.snapshot().link

    def _send(self, record: Record) -> bool:
        with self._lock:
            message = messages.record_message(self.client.client_id or "", record, self._moments)
        assert message is not None
        if self._on_loop(lambda service: service.put(*message)):
            return True
        with self._lock:
            if self._connection.known and len(self._early) < _MAX_EARLY:
                self._early.append(message)
                return True
        logger.error(
            "nothing is logged: %s",
            "too much waits for run" if self._connection.known else "the client is not connected",
            extra={"action": "log_refused"},
        )
        return False

    def check_task_abort(self) -> None:
        """Do nothing: no task runs in this process."""

    def get_model_from_combiner(self, model_id: str) -> ScaleoutModel:
        """Download a model; blocks.

        Raises NotConnectedError, ModelNotFoundError, ModelTransferError, ModelSignatureError and CallError.
        """
        return run_blocking(lambda: self._download(model_id))

    def post_signature(self, signature: Mapping[str, Any]) -> None:
        """Have the API keep what `ScaleoutModel.sign` returned; blocks. Raises ConfigError and TransportError."""
        self._connection.signature_api().post(signature)

    async def _download(self, model_id: str) -> ScaleoutModel:
        return await self._connection.download(self.client, model_id)
