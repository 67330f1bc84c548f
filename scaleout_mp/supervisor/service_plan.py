"""How a client works: what its user said of it, checked, and what belongs to one run."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, Self

from scaleout_mp.config import Limits, Resources, Sandbox, Settings, Surroundings
from scaleout_mp.config.checks import require_flag, require_kind, shown
from scaleout_mp.config.limits import parse_seconds
from scaleout_mp.config.resources import parse_gpus, parse_memory_budget
from scaleout_mp.config.sandbox import LevelName, as_sandbox
from scaleout_mp.errors import ConfigError
from scaleout_mp.executor import ExecutorCore
from scaleout_mp.executor.core import default_concurrency, parse_state_bytes
from scaleout_mp.executor.scheduling import require_room
from scaleout_mp.executor.worker_handle import Isolation, check_isolation
from scaleout_mp.supervisor.staged_model import inference_plan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scaleout_mp.supervisor.package_callbacks import PackageSource
    from scaleout_mp.supervisor.staged_model import InferencePlan
    from scaleout_mp.transport.calls import CombinerCalls
    from scaleout_mp.transport.transfer import ModelTransfer

StartMethod = Literal["template", "spawn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientOptions:
    """What a user says of a client, checked."""

    settings: Settings
    limits: Limits
    start_method: StartMethod
    sandbox: Sandbox
    isolation: Isolation
    #: Bytes.
    state_bytes: int
    #: Bytes; None: not counted.
    memory_budget: int | None
    gpus: tuple[str, ...] | None
    resources: Resources
    max_concurrent_tasks: int
    heartbeat_interval: float
    echo_output: bool
    surroundings: Surroundings
    #: Seconds to tell the server what is left to tell, at the end.
    goodbye_seconds: float
    inference: InferencePlan
    #: Where the callbacks come from; None: they are set on the client.
    package: PackageSource | None = None

    @classmethod
    def checked(
        cls,
        *,
        settings: Settings,
        limits: Limits | None,
        start_method: StartMethod,
        sandbox: Sandbox | LevelName,
        isolation: Isolation,
        state_bytes: int | str,
        memory_budget: float | str | None,
        gpus: Sequence[int | str] | None,
        resources: Resources | None,
        max_concurrent_tasks: int | None,
        heartbeat_interval: float | str,
        goodbye_seconds: float | str,
        inference_concurrency: int,
        inference_idle_time: float | str | None,
        inference_limits: Limits | None,
        **others: Any,
    ) -> Self:
        """Check what a user said; `others` are fields as they are. Raises ConfigError that names the field."""
        heartbeat = parse_seconds(heartbeat_interval, field="heartbeat_interval")
        if heartbeat <= 0:
            raise ConfigError(f"heartbeat_interval must be above 0 seconds, not {heartbeat_interval!r}")
        goodbye = parse_seconds(goodbye_seconds, field="goodbye_seconds")
        if goodbye < 0:
            raise ConfigError(f"goodbye_seconds must be at least 0, not {goodbye_seconds!r}")
        most = default_concurrency() if max_concurrent_tasks is None else max_concurrent_tasks
        if type(most) is not int or most < 1:
            raise ConfigError(f"max_concurrent_tasks must be a whole number above 0, not {shown(most)}")
        if start_method not in {"template", "spawn"}:
            raise ConfigError(f'start_method must be "template" or "spawn", not {start_method!r}')
        check_isolation(isolation)
        require_flag("echo_output", others["echo_output"])
        require_kind(Limits, limits=limits, inference_limits=inference_limits)
        require_kind(Resources, resources=resources)
        options = cls(
            settings=settings,
            limits=limits or Limits(),
            start_method=start_method,
            sandbox=as_sandbox(sandbox),
            isolation=isolation,
            state_bytes=parse_state_bytes(state_bytes),
            memory_budget=parse_memory_budget(memory_budget),
            gpus=parse_gpus(gpus),
            resources=resources or Resources(),
            max_concurrent_tasks=most,
            heartbeat_interval=heartbeat,
            goodbye_seconds=goodbye,
            inference=inference_plan(
                cache_dir=settings.model_cache_dir,
                concurrency=inference_concurrency,
                idle_time=inference_idle_time,
                limits=limits or Limits(),
                request_limits=inference_limits,
            ),
            **others,
        )
        for demanded in (options.limits, options.inference.limits):
            require_room(demanded, options.resources, memory_budget=options.memory_budget, gpus=options.gpus)
        return options


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServicePlan(ClientOptions):
    """How one run of a client works."""

    client_id: str
    name: str
    with_heartbeat: bool
    with_polling: bool
    #: Why the program cannot be started anew in its own place; empty when it can.
    cannot_restart: str
    #: How models come and go over given calls.
    make_transfer: Callable[[CombinerCalls], ModelTransfer]

    def make_core(self) -> ExecutorCore:
        """Return an executor for its tasks, on the running loop."""
        return ExecutorCore(
            limits=self.limits,
            start_method=self.start_method,
            # What tasks need is loaded with their callbacks: many clients wait for long, some of them on small devices.
            preload=(),
            sandbox=self.sandbox,
            state_bytes=self.state_bytes,
            memory_budget=self.memory_budget,
            gpus=self.gpus,
            resources=self.resources,
            max_concurrent_tasks=self.max_concurrent_tasks,
            echo_output=self.echo_output,
            surroundings=self.surroundings,
        )
