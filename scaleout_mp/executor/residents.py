"""Workers: processes that stay for the next task, with all that callables left in them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.config import Limits
from scaleout_mp.errors import LauncherError, ProtocolViolation
from scaleout_mp.executor import ladder
from scaleout_mp.executor.beside import beside
from scaleout_mp.executor.scheduling import Demand, Holding, Line, Place
from scaleout_mp.executor.watches import Watches
from scaleout_mp.ipc.channel import close_all

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scaleout_mp.config import Resources
    from scaleout_mp.executor.launcher import Child
    from scaleout_mp.executor.lines import TaskLines
    from scaleout_mp.executor.report import StopCause
    from scaleout_mp.executor.scratch import ScratchKeeper
    from scaleout_mp.ipc.arguments import PackedArguments
    from scaleout_mp.ipc.callables import PreparedCallable
    from scaleout_mp.ipc.frames import Frame
    from scaleout_mp.sandbox.cgroup import MemoryGroup
    from scaleout_mp.sandbox.memory import ProcessorClock

logger = logging.getLogger(__name__)

#: Seconds after which a worker that has nothing to do is ended, unless its user says otherwise.
IDLE_SECONDS: Final = 600.0
#: Seconds that a worker which is ended gets for its threads and exit handlers.
_EXIT_GRACE: Final = 2.0
#: The limits that bound each task; all others bound the process, and hold for its whole life.
_OF_A_TASK: Final = frozenset({"wall_time", "cpu_time", "no_progress", "pids", "output_bytes", "abort_grace"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetUp:
    """A call that every process of a worker begins with. The arguments stay open for as long as it is used."""

    call: PreparedCallable
    arguments: PackedArguments
    #: What it may use; None: as much as the task that it is made for. The limits of the process must be the same.
    limits: Limits | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """Which worker runs a task. Workers of one name are alike: the latest description counts."""

    name: str
    #: How many of its tasks may run at once, each in a process that keeps its own state.
    processes: int = 1
    #: Seconds without a task after which a process is ended; None: never.
    idle_seconds: float | None = IDLE_SECONDS
    set_up: SetUp | None = None
    #: What it was made from, where that changes: a process of another edition is ended before the next task.
    edition: str = ""


@dataclasses.dataclass(eq=False, kw_only=True)
class Resident:
    """One process of a worker, while it runs a task and between two."""

    spec: WorkerSpec
    limits: Limits
    tag: int
    lines: TaskLines
    group: MemoryGroup | None
    #: Its scratch folder, which stays as long as the process, and who removes it.
    scratch: str
    scratch_keeper: ScratchKeeper
    child: Child
    clock: ProcessorClock
    #: Keys and names of the callables that it holds, oldest first.
    keys: dict[str, str]
    #: Bytes of models and arguments that it was handed and may still map.
    handed: int = 0
    idle_since: float = 0.0
    watches: Watches | None = None
    resources: Resources
    #: What of the machine it has until it is gone.
    holding: Holding

    @property
    def pid(self) -> int:
        """The pid of its first process."""
        return self.child.started.result().pid

    def serves(self, spec: WorkerSpec, limits: Limits, resources: Resources) -> bool:
        """Whether it may run a task: a process keeps the limits and resources that it was started with."""
        return (
            self.spec.set_up == spec.set_up
            and self.spec.edition == spec.edition
            and (self.limits is limits or _of_process(self.limits) == _of_process(limits))
            and self.resources == resources
        )


def _of_process(limits: Limits) -> list[Any]:
    names = [field.name for field in dataclasses.fields(limits) if field.name not in _OF_A_TASK]
    return [getattr(limits, name) for name in names]


class ResidentPool:
    """The processes that wait for a task. On the executor's event loop."""

    def __init__(self) -> None:
        #: Who hears when a process waits, and gets what one had that is gone. Set by who makes both.
        self.line: Line | None = None
        #: The one that has waited longest comes first.
        self._idle: dict[Resident, None] = {}
        self._ending: dict[asyncio.Task[None], Resident] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False

    def find(self, wanted: Place) -> Resident | None:
        """Return the process that ran last; None when a new one is needed. Those that do not fit any more are ended."""
        assert wanted.worker is not None
        found = None
        for resident in self._of(wanted.worker.name):
            if wanted.fits(resident):
                found = resident
            else:
                self._end(resident, "the next task wants another one")
        return found

    def take(self, resident: Resident) -> None:
        """Take a process out, for a task."""
        del self._idle[resident]

    def _of(self, name: str) -> list[Resident]:
        return [resident for resident in self._idle if resident.spec.name == name]

    def give_back(self, resident: Resident) -> None:
        """Take a process that has done its task."""
        if resident.idle_since == 0.0:
            resident.child.exited.add_done_callback(lambda _: self._on_exit(resident))
        resident.idle_since = asyncio.get_running_loop().time()
        resident.lines.idle(on_frame=_on_frame, on_closed=lambda violation: self._on_closed(resident, violation))
        self._idle[resident] = None
        if self._closing or not resident.lines.channel.open or resident.child.exited.done():
            self._end(resident, "it is not needed any more")
            return
        self._watch(resident)
        self._set_timer()
        if self.line is not None:
            self.line.advance()

    def _watch(self, resident: Resident) -> None:
        """Keep what threads and children of earlier tasks use within the limits."""
        if resident.watches is not None:
            # It was taken for a task that did not come.
            return
        limits = resident.limits
        by_watching = limits.memory_bytes and resident.group is None
        if by_watching or limits.pids is not None or limits.scratch_size is not None:
            resident.watches = Watches(
                Limits(
                    memory=limits.memory if by_watching else None, pids=limits.pids, scratch_size=limits.scratch_size
                ),
                tag=resident.tag,
                shared=resident.handed,
                group=None,
                scratch=resident.scratch,
                on_breach=lambda cause, **_: self._on_breach(resident, cause),
            )
            resident.watches.process_runs(resident.pid, resident.child.lookout)

    def _on_breach(self, resident: Resident, cause: StopCause) -> None:
        if resident in self._idle:
            self._end(resident, f"it {cause.message} while it had no task", grace=0)
        else:
            # A task is about to come, which will find it dead.
            resident.lines.channel.close()

    def _on_closed(self, resident: Resident, violation: ProtocolViolation | None) -> None:
        if violation is not None and resident in self._idle:
            self._end(resident, str(violation), grace=0)

    def _on_exit(self, resident: Resident) -> None:
        if resident in self._idle:
            self._end(resident, "its process ended by itself")

    # --- Ending ------------------------------------------------------------------------------------------------------

    def retire(self, name: str) -> None:
        """End the processes of a worker that have no task."""
        for resident in self._of(name):
            self._end(resident, "it is not needed any more")

    def retire_oldest(self, kinds: set[str], *, kept_too: bool) -> bool:
        """End the process that has waited longest and has such things; False: none.

        Those that are not to be ended for being idle come last, and with `kept_too` only.
        """
        holders = [resident for resident in self._idle if resident.holding.demand.kinds & kinds]
        found = next((resident for resident in holders if resident.spec.idle_seconds is not None), None)
        if found is None and kept_too and holders:
            found = holders[0]
            logger.warning(
                "worker %s loses what it keeps: a task needs its %s, and nothing else will give it back",
                found.spec.name,
                " and ".join(sorted(kinds)),
                extra={"action": "kept_worker_ends", "worker": found.spec.name},
            )
        if found is not None:
            self._end(found, "its place is needed")
        return found is not None

    @property
    def coming(self) -> Demand:
        """What the processes that are ending will give back."""
        held = [resident.holding.demand for resident in self._ending.values()]
        return Demand(memory=sum(each.memory for each in held), gpus=sum(each.gpus for each in held))

    def _set_timer(self) -> None:
        due = min(self._due(), default=None)
        if due is not None and (self._timer is None or self._timer.when() > due):
            if self._timer is not None:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_at(due, self._on_timer)

    def _due(self) -> Iterator[float]:
        return (r.idle_since + r.spec.idle_seconds for r in self._idle if r.spec.idle_seconds is not None)

    def _on_timer(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        for resident in list(self._idle):
            seconds = resident.spec.idle_seconds
            if seconds is not None and resident.idle_since + seconds <= now:
                self._end(resident, f"it had nothing to do for {seconds:g} s")
        self._set_timer()

    def _end(self, resident: Resident, why: str, *, grace: float = _EXIT_GRACE) -> None:
        del self._idle[resident]
        logger.info(
            "worker %s: process %d ends: %s",
            resident.spec.name,
            resident.pid,
            why,
            extra={"action": "worker_ends", "worker": resident.spec.name},
        )
        task = asyncio.get_running_loop().create_task(
            end_process(resident, grace=grace), name=f"end of worker {resident.spec.name}"
        )
        self._ending[task] = resident
        task.add_done_callback(self._on_ended)

    def _on_ended(self, task: asyncio.Task[None]) -> None:
        resident = self._ending.pop(task)
        if self.line is not None:
            self.line.give_back(resident.holding)

    async def aclose(self) -> None:
        """End all that waits and see it gone."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        for resident in list(self._idle):
            self._end(resident, "the executor is closing")
        while self._ending:
            await asyncio.wait(set(self._ending))


def _on_frame(frame: Frame) -> None:
    # Code of ours is silent once a task is over: this is somebody else's.
    close_all(frame.descriptors)
    raise ProtocolViolation(f"it sent {frame.kind.name} while it had no task")


async def end_process(resident: Resident, *, grace: float) -> None:
    """End a worker's process and all that is below it; give back what it had."""
    if resident.watches is not None:
        resident.watches.close()
    exited = resident.child.exited
    # It leaves when its channel is closed.
    resident.lines.channel.close()
    await asyncio.wait([exited], timeout=grace)
    while not exited.done():
        await ladder.sweep(resident.tag, resident.child.tree_group)
        await asyncio.wait([exited], timeout=0.02)
    strays, cleared = True, None
    with contextlib.suppress(LauncherError):
        strays, cleared = exited.result().strays, exited.result().cleared
    if strays:
        await ladder.clear(resident.tag, resident.child.tree_group, cleared)
    resident.lines.close()
    resident.clock.close()
    if resident.group is not None:
        await beside(resident.group.remove)
    if resident.scratch:
        await resident.scratch_keeper.give_back(resident.scratch)
