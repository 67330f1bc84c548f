"""One task from the order to the report: it ties its process, what it says, its stopping and the report together."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.errors import LauncherError, ProtocolViolation
from scaleout_mp.executor import ladder
from scaleout_mp.executor.answer import Answer
from scaleout_mp.executor.beside import beside
from scaleout_mp.executor.launcher import Child, Launcher, StartOrder
from scaleout_mp.executor.lines import TaskLines
from scaleout_mp.executor.plan import Outcome
from scaleout_mp.executor.report import Evidence, StopCause, make_report
from scaleout_mp.executor.stopping import Stopping
from scaleout_mp.executor.task_frames import TaskFrames
from scaleout_mp.executor.task_process import TaskProcess
from scaleout_mp.executor.watches import Watches
from scaleout_mp.ipc import frames
from scaleout_mp.ipc.frames import Frame, Kind
from scaleout_mp.task import (
    INTERRUPTIONS,
    AbortOrigin,
    EndReason,
    TaskLife,
    TaskState,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from scaleout_mp.config import Limits, Resources
    from scaleout_mp.executor.output import OutputRelay
    from scaleout_mp.executor.plan import ExecutionPlan
    from scaleout_mp.executor.residents import WorkerSpec
    from scaleout_mp.executor.scheduling import Place
    from scaleout_mp.sandbox.confinement import Confinement

logger = logging.getLogger(__name__)

#: Seconds that threads and exit handlers get once the result is in.
EXIT_GRACE: Final = 2.0

_ABORT_TEXT: Final = {
    AbortOrigin.SERVER: "Aborted by server",
    AbortOrigin.SERVER_TIMEOUT: "Timed out by server",
    AbortOrigin.CLIENT: "Aborted by client",
}


class Execution:
    """One task. Use it on the executor's event loop only."""

    def __init__(self, plan: ExecutionPlan, launcher: Launcher, relay: OutputRelay, *, echo: bool) -> None:
        self._plan = plan
        self._launcher = launcher
        self._relay = relay
        self._echo = echo
        self._loop = asyncio.get_running_loop()
        self._life = TaskLife()
        self._evidence = Evidence(task_id=plan.task_id, name=plan.name, limits=plan.limits)
        #: What it runs in.
        self._process = TaskProcess()
        self._stopping = Stopping(self._process, launcher, self._evidence)
        self._answer = Answer(self._evidence, max_model_size=plan.max_model_size, on_violation=self._on_closed)
        self._frames = TaskFrames(plan, relay, self._evidence, self._answer)
        #: Due once the task itself has decided its end.
        self._leaving: asyncio.TimerHandle | None = None
        #: What it was given when its turn came.
        self.place: Place | None = None
        #: Called when the process is gone, before what it leaves behind is tidied up.
        self.on_gone: Callable[[], None] | None = None
        self._outcome: asyncio.Future[Outcome] = self._loop.create_future()
        #: Done as soon as somebody wants the task to end.
        self.stop_requested: asyncio.Future[None] = self._loop.create_future()

    @property
    def task_id(self) -> str:
        """The id of the task."""
        return self._plan.task_id

    @property
    def limits(self) -> Limits:
        """Its limits."""
        return self._plan.limits

    @property
    def resources(self) -> Resources:
        """What it gets of the machine."""
        return self._plan.resources

    @property
    def worker(self) -> WorkerSpec | None:
        """The worker that runs it; None: a process of its own."""
        return self._plan.worker

    @property
    def worker_stays(self) -> bool:
        """Whether a worker's process has outlived the task."""
        return False

    @property
    def worker_was_set_up(self) -> bool:
        """Whether a worker's process was ready for the task."""
        return False

    @property
    def name(self) -> str:
        """What runs, for people."""
        return self._plan.name

    @property
    def state(self) -> TaskState:
        """Where the task is in its life."""
        return self._life.state

    @property
    def memory_now(self) -> int:
        """Bytes that the tree has made its own, at the last look."""
        tree = self._process.tree
        return 0 if tree is None else tree.memory.now

    @property
    def memory_peak(self) -> int:
        """The largest value of `memory_now` so far."""
        tree = self._process.tree
        return 0 if tree is None else tree.memory.peak

    @property
    def memory_limit(self) -> int | None:
        """Bytes; None: no limit."""
        return self._plan.limits.memory_bytes or None

    def abort(self, origin: AbortOrigin, reason: str = "") -> None:
        """Ask the task to stop, and see to it that it does. Further calls change nothing."""
        text = reason or _ABORT_TEXT[origin]
        self._stop(StopCause(reason=origin.end_reason, message=text), abort_text=text)

    def refuse(self, problem: str) -> None:
        """Have the task end without a start. Called before `run`."""
        self._evidence.launcher_problem = problem

    def _require_place(self) -> Place:
        assert self.place is not None
        return self.place

    def kill(self) -> None:
        """Call off the grace of a task that was aborted: it is killed now."""
        self._stopping.hurry()

    async def outcome(self) -> Outcome:
        """Wait until the task is gone with all its descendants. Cancelling the wait leaves the task alone."""
        return await asyncio.shield(self._outcome)

    def add_done_callback(self, callback: Callable[[Outcome], None]) -> None:
        """Have `callback` called with the outcome, on the loop; at once if the task is over."""
        self._outcome.add_done_callback(lambda done: callback(done.result()))

    def _advance(self, state: TaskState) -> None:
        self._life.advance(state)
        if self._plan.on_state is not None:
            try:
                self._plan.on_state(state)
            except Exception:
                # The listener's fault must not cost the task its life, or its report.
                logger.exception("a state could not be passed on", extra={"action": "state_listener_failed"})

    async def run(self) -> None:
        """Live the task's life. Called once, by the executor, when the task's turn has come."""
        started_at = self._loop.time()
        try:
            if self._evidence.stop is None and self._evidence.launcher_problem is None:
                self._advance(TaskState.STARTING)
                await self._live()
        except OSError as error:
            # No descriptors or no memory for them: this machine is full, which the report says.
            self._evidence.launcher_problem = f"cannot start a task: {error}"
        except Exception as error:
            # A mistake of this package: whoever waits for the task must hear of it, and the task must not go on.
            logger.exception("a task could not be run", extra={"action": "task_not_run", "task_id": self.task_id})
            self._evidence.launcher_problem = f"cannot run a task: {type(error).__name__}: {error}"
            await ladder.sweep(self._process.tag, self._process.tree_group)
        finally:
            try:
                await self._tidy_up()
            except OSError as error:
                self._evidence.launcher_problem = f"cannot tidy up after a task: {error}"
            finally:
                self._evidence.wall_seconds = self._loop.time() - started_at
                self._finish()

    def give_up(self, error: Exception) -> None:
        """Have the outcome say that running the task failed, unless there is one already. Called after `run`."""
        if not self._outcome.done():
            logger.error("a task has no report", exc_info=error, extra={"action": "no_report", "task_id": self.task_id})
            # Without its limits and what else was seen of it: they may be what cannot be reported.
            problem = f"cannot run a task: {type(error).__name__}: {error}"
            bare = Evidence(task_id=self.task_id, name=self.name, launcher_problem=problem)
            self._outcome.set_result(Outcome(report=make_report(bare)))

    async def _live(self) -> None:
        self._start()
        await self._see_through()

    async def _tidy_up(self) -> None:
        if self._process.watches is not None:
            self._process.watches.close()
        self._stopping.close()
        if self._leaving is not None:
            self._leaving.cancel()
        if self._process.lines is not None:
            self._evidence.stdout_tail, self._evidence.stderr_tail = self._process.lines.output()
            self._evidence.output_lost = self._process.lines.output_lost
        self._plan.arguments.close()
        if self.on_gone is not None:
            self.on_gone()
        await self._leave_process()

    async def _leave_process(self) -> None:
        """Give back what the process had; it is gone."""
        if self._process.lines is not None:
            self._process.lines.close()
        if self._process.group is not None:
            await beside(self._process.group.remove)
        if self._process.scratch:
            await self._plan.scratch.give_back(self._process.scratch)

    def _start(self) -> None:
        plan = self._plan
        self._process.lines = lines = TaskLines(
            on_frame=self._on_frame,
            on_closed=self._on_closed,
            echo=self._relay.echo if self._echo else None,
            output_size=plan.limits.output_size,
        )
        # The task waits in the channel before its process exists: nothing is left to ask for after the fork.
        packed = plan.arguments
        self._send_task(lines)
        order = StartOrder(
            task_id=plan.task_id,
            call=plan.call,
            confinement=self._confinement(),
            descriptors=lines.descriptors,
        )
        self._process.watches = Watches(
            plan.limits,
            tag=self._process.tag,
            shared=packed.model_bytes + packed.memory_bytes,
            group=self._process.group,
            on_breach=self._on_breach,
            scratch=self._process.scratch,
        )
        self._process.child = self._launcher.start(order)
        lines.passed_on()

    def _send_task(self, lines: TaskLines) -> None:
        packed, slot = self._plan.arguments, self._plan.state
        state, memory = (None, ()) if slot is None else slot.fields()
        descriptors = [*packed.descriptors, *memory]
        lines.channel.send(
            frames.encode(Kind.TASK, self.task_id, packed.table, state, descriptors=len(descriptors)),
            descriptors,
            on_refused=self._on_task_refused,
        )

    def _on_task_refused(self, problem: str) -> None:
        self._stop(StopCause(reason=EndReason.REFUSED, message=f"cannot hand over its arguments: {problem}"), grace=0)

    def _confinement(self) -> Confinement:
        plan = self._plan
        if plan.limits.memory_bytes and plan.memory_groups is not None:
            self._process.group = plan.memory_groups.make(f"{self._process.tag:x}", plan.limits.memory_bytes)
        self._process.scratch = plan.scratch.make()
        return plan.confinement(
            tag=self._process.tag,
            group=self._process.group,
            scratch=self._process.scratch,
            holding=self._require_place().holding,
        )

    async def _see_through(self) -> None:
        child, lines, watches = self._process.child, self._process.lines, self._process.watches
        assert child is not None
        assert lines is not None
        assert watches is not None
        strays = True
        try:
            started = await child.started
            self._evidence.start_method = started.method
            self._evidence.layers = (
                started.layers if self._process.group is None else (*started.layers, self._process.group.NAME)
            )
            if self._life.state is TaskState.STARTING:
                self._advance(TaskState.RUNNING)
            self._watch_process(watches, child, started.pid)
            strays = await self._until_gone(child)
        except LauncherError as error:
            self._evidence.launcher_problem = str(error)
        await self._stopping.over()
        if strays:
            self._stopping.kill_group_later()
            exited = self._evidence.exited
            cleared = None if exited is None else exited.cleared
            self._evidence.strays_killed = await ladder.clear(self._process.tag, child.tree_group, cleared)
        # What was in the socket before the end counts, however the end came.
        lines.channel.drain()
        await self._answer.checked()

    def _watch_process(self, watches: Watches, child: Child, pid: int) -> None:
        watches.process_runs(pid, child.lookout)

    async def _until_gone(self, child: Child) -> bool:
        """Wait for the end of the task's process; return whether its tree may have left something."""
        exited = await child.exited
        self._evidence.exited = exited
        if self._process.watches is not None:
            self._process.watches.catch_up()
        self._evidence.killed_by_kernel = self._process.tree is not None and self._process.tree.killed_by_kernel()
        return exited.strays

    def _stop(self, cause: StopCause, *, abort_text: str = "", grace: float | None = None) -> None:
        seen = self._evidence
        decided = seen.stop is not None or seen.has_result or seen.failure is not None
        if decided or self._life.ended:
            return
        seen.stop = cause
        self.stop_requested.set_result(None)
        logger.info(
            "stopping task %s: %s",
            self.name,
            cause.message,
            extra={"action": "task_stopping", "task_id": self.task_id, "reason": cause.reason.value},
        )
        if self._life.state is TaskState.PENDING:
            return
        if self._life.state is not TaskState.STOPPING:
            self._advance(TaskState.STOPPING)
        self._climb(abort_text, self._plan.limits.abort_grace_seconds if grace is None else grace)

    def _on_breach(self, cause: StopCause, *, graceful: bool) -> None:
        self._stop(cause, abort_text=cause.message, grace=None if graceful else 0)
        if not graceful and self._evidence.stop is cause:
            # At 10 GB/s each millisecond until the search for all of them has ended would be another 10 MB.
            self._stopping.kill_known()

    def _climb(self, abort_text: str, grace: float) -> None:
        self._stopping.begin(abort_text, grace, self._gone)

    def _gone(self, child: Child) -> asyncio.Future[Any]:
        """Return what is done once the task needs no further stopping."""
        return child.exited

    def _hurry_exit(self) -> None:
        """Once the end is decided by the task itself, its process has only so long to leave."""
        self._leaving = self._loop.call_later(EXIT_GRACE, self._climb, "", 0)

    def _on_frame(self, frame: Frame) -> None:
        self._evidence.heard = True
        if self._process.watches is not None:
            self._process.watches.sign_of_life()
        if self._frames.take(frame):
            self._hurry_exit()

    def _on_closed(self, violation: ProtocolViolation | None) -> None:
        if violation is not None:
            cause = StopCause(reason=EndReason.PROTOCOL, message=f"broke the rules of the control channel: {violation}")
            self._stop(cause, grace=0)

    def _finish(self) -> None:
        seen = self._evidence
        seen.peak_memory = self.memory_peak
        report = make_report(seen)
        self._advance(TaskState.ENDED)
        if self._plan.state is not None:
            asked = report.reason in INTERRUPTIONS
            self._plan.state.settle(self.name, completed=report.completed, asked=asked)
        level = logging.DEBUG if report.completed else logging.WARNING
        if logger.isEnabledFor(level):
            logger.log(
                level,
                "%s",
                report.explain(),
                extra={"action": "task_ended", "task_id": self.task_id, "reason": report.reason.value},
            )
        # Whoever awaits the outcome owns the result.
        value = self._answer.give()
        if not self._outcome.done():
            self._outcome.set_result(
                Outcome(report=report, value=value if report.completed else None, lent_back=self._answer.lent_back)
            )
        self._process.forget()
        self._stopping.forget()
