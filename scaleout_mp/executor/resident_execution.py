"""One task in a worker: a process that may have run others before, and stays if this one leaves it whole."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.executor import ladder
from scaleout_mp.executor.execution import Execution
from scaleout_mp.executor.residents import Resident, ResidentPool, SetUp, WorkerSpec, end_process
from scaleout_mp.executor.scheduling import NOTHING
from scaleout_mp.executor.template import send_callable
from scaleout_mp.executor.watches import Watches
from scaleout_mp.ipc import frames
from scaleout_mp.ipc.frames import Kind
from scaleout_mp.sandbox import memory, tree
from scaleout_mp.task import INTERRUPTIONS, AbortOrigin, StopStage

if TYPE_CHECKING:
    from scaleout_mp.executor.launcher import Child, Launcher
    from scaleout_mp.executor.lines import TaskLines
    from scaleout_mp.executor.output import OutputRelay
    from scaleout_mp.executor.plan import ExecutionPlan
    from scaleout_mp.executor.report import StopCause
    from scaleout_mp.ipc.frames import Frame
    from scaleout_mp.sandbox.confinement import Confinement

#: Bytes of arguments that a worker's tasks may have mapped at once before RLIMIT_DATA, a backstop, refuses more.
_ARGUMENTS: Final = 4 << 30


class ResidentExecution(Execution):
    """One task in a worker. Its turn has come when no other task is in the process that it gets."""

    def __init__(
        self, plan: ExecutionPlan, launcher: Launcher, relay: OutputRelay, *, echo: bool, pool: ResidentPool | None
    ) -> None:
        """`pool` takes the process when the task is over; None: whoever looks at `resident` does."""
        super().__init__(plan, launcher, relay, echo=echo)
        assert plan.worker is not None
        self._spec: WorkerSpec = plan.worker
        self._pool = pool
        self._evidence.worker = self._spec.name
        #: None while the process is new.
        self._resident: Resident | None = None
        #: The process, once the task is over; None: it is gone, or in the pool.
        self.resident: Resident | None = None
        #: Whether the process said that the callable begins.
        self._began = False
        #: Done when the result is in, or the failure.
        self._said_end: asyncio.Future[None] = self._loop.create_future()
        #: Done when the task needs no further stopping.
        self._needs_no_stop: asyncio.Future[None] = self._loop.create_future()
        self._clock: memory.ProcessorClock | None = None
        self._cpu_before = 0.0
        self._stays = False

    @property
    def worker_stays(self) -> bool:
        """Whether the process goes on to serve other tasks, once this one is over."""
        return self._stays

    @property
    def worker_was_set_up(self) -> bool:
        """Whether the process had made the worker's first call by the time at which the task began."""
        return self._evidence.set_up is None and self._began

    async def run(self) -> None:
        """Live the task's life; the process is back in the pool, or gone, when the outcome is there."""
        await super().run()
        resident, self._resident = self._resident, None
        if not self._stays:
            if resident is not None:
                # What it had is the task's place's to give back, as for a process of its own.
                self._require_place().holding = resident.holding
        elif self._pool is None:
            self.resident = resident
        elif resident is not None:
            self._pool.give_back(resident)

    async def _live(self) -> None:
        while await self._get_process():
            self._start()
            await self._see_through()
            if self._resident is None or self._began or self._evidence.stop is not None or self._stays:
                break
            # It had ended before this task came to it: no fault of this task, which gets another one.
            await self._leave_process()
            self._forget_process()

    # --- The process -------------------------------------------------------------------------------------------------

    async def _get_process(self) -> bool:
        """Adopt the process that the task was given, or see to a new one; False when there will be none."""
        place = self._require_place()
        resident, place.resident = place.resident, None
        if resident is not None and not (resident.lines.channel.open and not resident.child.exited.done()):
            await end_process(resident, grace=0)
            place.holding, resident = resident.holding, None
        if resident is None and self._spec.set_up is not None:
            resident = await self._set_up(self._spec.set_up)
            if resident is None:
                return False
        if self._evidence.stop is not None:
            # Whoever comes next may have it.
            place.resident = resident
            return False
        if resident is not None:
            self._adopt(resident)
        return True

    async def _set_up(self, set_up: SetUp) -> Resident | None:
        """Make the worker's first call in a new process; None when that failed or the task is to stop."""
        plan = dataclasses.replace(
            self._plan,
            task_id=f"{self.task_id}:set-up",
            name=f"{set_up.call.name} of worker {self._spec.name}",
            call=set_up.call,
            arguments=set_up.arguments.copy(),
            limits=set_up.limits or self._plan.limits,
            worker=dataclasses.replace(self._spec, set_up=None),
            state=None,
            on_state=None,
        )
        first = ResidentExecution(plan, self._launcher, self._relay, echo=self._echo, pool=None)
        first.place = self._require_place()
        running = self._loop.create_task(first.run())
        either: list[asyncio.Future[Any]] = [running, self.stop_requested]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            first.abort(AbortOrigin.CLIENT, "the task that it was started for is to end")
            await asyncio.wait([running, self._stopping.hurried], return_when=asyncio.FIRST_COMPLETED)
            first.kill()
        await running
        report = (await first.outcome()).report
        if first.resident is not None:
            first.resident.spec = self._spec
            # Those of the process are the same.
            first.resident.limits = self._plan.limits
            if report.completed:
                return first.resident
            # A process in which it failed is not set up.
            await end_process(first.resident, grace=0)
            self._require_place().holding = first.resident.holding
        self._evidence.set_up = report
        return None

    def _adopt(self, resident: Resident) -> None:
        self._resident = resident
        self._process.tag = resident.tag
        self._process.lines, self._process.group, self._process.child = resident.lines, resident.group, resident.child
        self._process.scratch = resident.scratch
        self._clock = resident.clock
        self._cpu_before = resident.clock.seconds() or 0.0
        if resident.watches is not None:
            resident.watches.close()
            resident.watches = None

    def _forget_process(self) -> None:
        assert self._resident is not None
        self._require_place().holding = self._resident.holding
        self._resident = self._process.lines = self._process.group = self._process.child = self._clock = None
        self._process.tag = tree.new_tag()
        self._process.scratch = ""
        self._cpu_before = 0.0
        self._evidence.exited = self._evidence.launcher_problem = None
        self._evidence.killed_by_kernel = False
        self._evidence.strays_killed = 0
        if self._process.watches is not None:
            self._process.watches.close()

    def _start(self) -> None:
        resident, plan = self._resident, self._plan
        if resident is None:
            super()._start()
            return
        resident.lines.serve(on_frame=self._on_frame, on_closed=self._on_closed, output_size=plan.limits.output_size)
        send_callable(resident.lines.channel, resident.keys, plan.call)
        self._send_task(resident.lines)
        self._process.watches = Watches(
            plan.limits,
            tag=self._process.tag,
            shared=self._handed_over(),
            group=self._process.group,
            scratch=self._process.scratch,
            on_breach=self._on_breach,
        )

    def _handed_over(self) -> int:
        """Return how much of the shared memory that the process maps is not its own doing."""
        handed = self._plan.arguments.model_bytes + self._plan.arguments.memory_bytes
        resident = self._resident
        if resident is None:
            return handed
        if resident.handed:
            # Of what earlier tasks were handed, only what is still mapped.
            with contextlib.suppress(OSError):
                resident.handed = min(resident.handed, memory.shared_size(resident.pid))
        resident.handed += handed
        return resident.handed

    def _send_task(self, lines: TaskLines) -> None:
        packed = self._plan.arguments
        no_progress = self._plan.limits.seconds("no_progress")
        lines.channel.send(
            frames.encode(
                Kind.TASK,
                self.task_id,
                packed.table,
                self._plan.call.key,
                0.0 if no_progress is None else min(1.0, no_progress / 4),
                "" if self._plan.state is None else self._plan.state.name,
                descriptors=len(packed.descriptors),
            ),
            packed.descriptors,
            on_refused=self._on_task_refused,
        )

    def _confinement(self) -> Confinement:
        # Processor time is counted for each task; a limit of the process would count them all.
        return dataclasses.replace(super()._confinement(), resident=True, cpu_limit=0, handed_over=_ARGUMENTS)

    def _watch_process(self, watches: Watches, child: Child, pid: int) -> None:
        watches.process_runs(pid, child.lookout, cpu_before=self._cpu_before)

    # --- The end -----------------------------------------------------------------------------------------------------

    def _on_frame(self, frame: Frame) -> None:
        self._began = True
        super()._on_frame(frame)

    def _on_breach(self, cause: StopCause, *, graceful: bool) -> None:
        if self._resident is not None and not self._began and not graceful:
            # What the process has taken by now is the doing of what earlier tasks left: this one gets another.
            self._stopping.kill_known()
            tree.signal_process(self._resident.pid, self._process.tag, signal.SIGKILL)
            return
        super()._on_breach(cause, graceful=graceful)

    def _hurry_exit(self) -> None:
        self._needs_no_more_stopping()
        if not self._said_end.done():
            self._said_end.set_result(None)

    def _gone(self, child: Child) -> asyncio.Future[Any]:
        child.exited.add_done_callback(lambda _: self._needs_no_more_stopping())
        return self._needs_no_stop

    def _needs_no_more_stopping(self) -> None:
        if not self._needs_no_stop.done():
            self._needs_no_stop.set_result(None)

    async def _until_gone(self, child: Child) -> bool:
        either: list[asyncio.Future[Any]] = [child.exited, self._said_end]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        await self._stopping.over()
        await self._answer.checked()
        if self._clock is None:
            with contextlib.suppress(OSError):
                self._clock = memory.ProcessorClock(child.started.result().pid)
        if self._clock is not None:
            self._note_processor_time(self._clock.seconds())
        if self._is_whole(child):
            self._stays = self._evidence.worker_stays = True
            self._keep(child)
            return False
        await self._kill(child)
        strays = await super()._until_gone(child)
        assert self._evidence.exited is not None
        self._note_processor_time(self._evidence.exited.cpu_seconds)
        return strays

    def _note_processor_time(self, seconds: float | None) -> None:
        if seconds is not None:
            self._evidence.cpu_seconds = max(0.0, seconds - self._cpu_before)

    def _is_whole(self, child: Child) -> bool:
        """Whether the process may run another task."""
        seen = self._evidence
        if (
            child.exited.done()
            or not self._said_end.done()
            or self._process.lines is None
            or not self._process.lines.channel.open
        ):
            return False
        if self._clock is None:
            # This program has no descriptor left for it.
            return False
        if seen.failure is not None and seen.failure.refused is not None and seen.stop is None:
            # It ran into a limit: what it holds may be why.
            return False
        if self._process.tree is not None and self._process.tree.killed_by_kernel():
            # A child of it that is: the next task would be taken for the one that passed the limit.
            return False
        if seen.stop is None:
            return True
        # By those, nothing is wrong with the process.
        return seen.stop.reason in INTERRUPTIONS and seen.stopped_by in {None, StopStage.ABORT}

    def _keep(self, child: Child) -> None:
        if self._resident is not None:
            return
        assert self._process.lines is not None
        assert self._clock is not None
        place = self._require_place()
        # None: the place was given up before the task was over, since everything ends.
        holding, place.holding = place.holding or NOTHING, None
        self._resident = Resident(
            spec=self._spec,
            limits=self._plan.limits,
            resources=self._plan.resources,
            holding=holding,
            tag=self._process.tag,
            lines=self._process.lines,
            group=self._process.group,
            scratch=self._process.scratch,
            scratch_keeper=self._plan.scratch,
            child=child,
            clock=self._clock,
            keys={self._plan.call.key: self._plan.call.name},
            handed=self._handed_over(),
        )

    async def _kill(self, child: Child) -> None:
        while not child.exited.done():
            await ladder.sweep(self._process.tag, child.tree_group)
            await asyncio.wait([child.exited], timeout=0.02)

    async def _leave_process(self) -> None:
        if self._stays:
            return
        if self._process.child is not None:
            # It lives still if the task could not even be sent to it.
            await self._kill(self._process.child)
        if self._clock is not None:
            self._clock.close()
        await super()._leave_process()

    def _climb(self, abort_text: str, grace: float) -> None:
        # Without a process of its own yet, the task waits for the worker's first call, which is aborted instead.
        if self._process.child is not None:
            super()._climb(abort_text, grace)
