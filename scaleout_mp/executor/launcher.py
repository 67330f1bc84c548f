"""The contract between the executor and whatever starts processes for it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio

    from scaleout_mp.executor.interpreter import Interpreter
    from scaleout_mp.executor.lookout import LookoutLine
    from scaleout_mp.ipc.callables import PreparedCallable
    from scaleout_mp.sandbox.confinement import Confinement
    from scaleout_mp.sandbox.tree_group import TreeGroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartOrder:
    """One process to start. The launcher passes the descriptors on and keeps none."""

    task_id: str
    call: PreparedCallable
    confinement: Confinement
    #: The child's channel, standard output, standard error and place for stacks.
    descriptors: tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Started:
    """A process runs."""

    pid: int
    #: "template" or "spawn".
    method: str
    #: What confines it, for people.
    layers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exited:
    """A process is gone and reaped."""

    #: Exit code, or minus the signal that ended it.
    code: int
    cpu_seconds: float
    #: Bytes.
    max_rss: int
    #: Whether its tree may have left something: somebody should look.
    strays: bool
    #: Where the launcher can tell when nobody is left: done then, with how many it has killed itself; never, perhaps,
    #: where it is stuck.
    cleared: asyncio.Future[int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Child:
    """A process that was ordered. Either future raises LauncherError when the launcher cannot tell any more."""

    started: asyncio.Future[Started]
    exited: asyncio.Future[Exited]
    #: Watches its memory when it is near its limit, where the launcher has somebody for that.
    lookout: LookoutLine | None = None
    #: Holds it with all that is below it, and others, where there is such a group.
    tree_group: TreeGroup | None = None


class Launcher(Protocol):
    """Starts the processes of tasks. All methods are called on one event loop, by `ExecutorCore`."""

    @property
    def missing_layers(self) -> tuple[str, ...]:
        """What confinement is asked for and cannot be had, and why: one sentence each. Known once it is open."""
        ...

    async def open(self) -> None:
        """Get ready. Called once, before the first start."""
        ...

    def start(self, order: StartOrder) -> Child:
        """Order a process; returns at once."""
        ...

    def abandon(self, task_id: str) -> None:
        """Give up on an order whose process does not appear; its futures raise soon after.

        Called when the task is to stop. It may cost other tasks: a launcher that is stuck serves none.
        """
        ...

    def doom(self, tag: int) -> None:
        """Say that the task with this tag is being killed: nothing of it is worth to be spared any more."""
        ...

    async def renew(self, interpreter: Interpreter) -> None:
        """Load everything anew, in `interpreter`, for what is started from now on.

        What runs goes on. Raises LauncherError.
        """
        ...

    async def close(self) -> None:
        """End what `open` began. Called once, when no task runs any more."""
        ...
