"""What a user holds of a worker: its name, how it is set up, and how tasks get to it."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any, Literal

from scaleout_mp.config.limits import parse_seconds
from scaleout_mp.errors import ConfigError
from scaleout_mp.executor.residents import IDLE_SECONDS, SetUp, WorkerSpec
from scaleout_mp.ipc import arguments, callables

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from scaleout_mp.config import Limits, Resources
    from scaleout_mp.executor.task_executor import Task, TaskExecutor

logger = logging.getLogger(__name__)

Isolation = Literal["task", "worker"]


def check_isolation(isolation: str) -> None:
    """Raise ConfigError unless there is such a mode."""
    if isolation not in {"task", "worker"}:
        raise ConfigError(f'isolation must be "task" or "worker", not {isolation!r}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """How a worker is to be. A wrong value raises ConfigError, which names the field."""

    name: str
    #: Tasks that may run at once, each in a process that keeps its own state.
    processes: int = 1
    #: Time without a task after which a process is ended, in seconds or as "10m"; None: never.
    idle_time: float | str | None = IDLE_SECONDS

    def __post_init__(self) -> None:
        if type(self.name) is not str or not self.name:
            raise ConfigError(f"the name of a worker must be a string that says something, not {self.name!r}")
        if type(self.processes) is not int or self.processes < 1:
            raise ConfigError(f"processes must be a whole number above 0, not {self.processes!r}")
        if self.idle_time is not None and not parse_seconds(self.idle_time, field="idle_time") >= 0:
            raise ConfigError(f"idle_time must be at least 0 seconds, not {self.idle_time!r}")

    def spec(self, set_up: SetUp | None = None) -> WorkerSpec:
        """Return what the executor's core understands."""
        idle = None if self.idle_time is None else parse_seconds(self.idle_time, field="idle_time")
        return WorkerSpec(name=self.name, processes=self.processes, idle_seconds=idle, set_up=set_up)


class Worker:
    """A worker of a TaskExecutor, made by `TaskExecutor.worker`. Every method may be called from any thread.

    Its tasks run in order in a process that keeps what they leave in it: what modules and callables hold, and
    `current_task().state`. When that process crashes, is killed, passes a limit or had nothing to do for its idle
    time, the next task gets a fresh one, which first makes the call that the worker is set up with.
    """

    def __init__(
        self,
        executor: TaskExecutor,
        spec: WorkerSpec,
        limits: Limits | None,
        resources: Resources | None,
        *,
        set_up: Callable[..., Any] | None,
    ) -> None:
        self._executor = executor
        #: None also once there was something to say about it.
        self._set_up = set_up
        self._limits = limits
        self._resources = resources
        self.spec = spec

    @property
    def name(self) -> str:
        """Its name; it is in every report."""
        return self.spec.name

    def submit(self, function: Callable[..., Any], /, *args: Any, name: str | None = None, **kwargs: Any) -> Task:
        """Order `function(*args, **kwargs)` in this worker; see TaskExecutor.submit."""
        if self._set_up is not None and (copied := callables.copied_globals(self._set_up, function)):
            logger.warning(
                "worker %s: %s and %s are of the script itself and go there one by one, each with a copy of %s: "
                "what the first puts there, the second does not find. Put both into a module, see docs/isolation.md",
                self.name,
                callables.callable_name(self._set_up),
                callables.callable_name(function),
                ", ".join(copied),
                extra={"action": "globals_copied"},
            )
            self._set_up = None
        return self._executor.submit(
            function, *args, name=name, limits=self._limits, resources=self._resources, worker=self, **kwargs
        )

    def retire(self) -> None:
        """End its processes as soon as they have nothing to do; a later task starts a new one."""
        self._executor.retire_worker(self.name)

    def close(self) -> None:
        """Free what the set-up call holds; the executor does it at its end. No task may be submitted after."""
        if self.spec.set_up is not None:
            self.spec.set_up.arguments.close()


def pack_set_up(
    function: Callable[..., Any] | None, args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> SetUp | None:
    """Pickle the call that a worker is set up with. Raises CallbackNotSendable and ValueNotSendable."""
    if function is None:
        return None
    return SetUp(call=callables.prepare(function), arguments=arguments.pack(args, kwargs or {}))
