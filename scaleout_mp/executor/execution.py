"""One task from the order to the report: it ties channel, watchdog, ladder and report together."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.errors import LauncherError, ProtocolViolation
from scaleout_mp.executor import ladder
from scaleout_mp.executor.answer import Answer
from scaleout_mp.executor.beside import beside
from scaleout_mp.executor.launcher import Child, Launcher, StartOrder
from scaleout_mp.executor.lines import TaskLines
from scaleout_mp.executor.plan import Outcome
from scaleout_mp.executor.report import Evidence, StopCause, make_report
from scaleout_mp.executor.watches import Watches
from scaleout_mp.ipc import frames, messages
from scaleout_mp.ipc.channel import close_all
from scaleout_mp.ipc.frames import Frame, Kind
from scaleout_mp.sandbox import memory, tree
from scaleout_mp.task import (
    AbortOrigin,
    EndReason,
    LogLine,
    MetricRecord,
    Record,
    StopStage,
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
    from scaleout_mp.executor.watchdog import TreeWatch
    from scaleout_mp.sandbox.cgroup import MemoryGroup
    from scaleout_mp.sandbox.confinement import Confinement

logger = logging.getLogger(__name__)

#: Seconds that threads and exit handlers get once the result is in.
EXIT_GRACE: Final = 2.0

#: Seconds that a process which is being started may take to appear before its launcher counts as stuck.
_START_GRACE: Final = 1.0

#: Descendants of a task beyond which a search for them is not for the event loop.
_MANY: Final = 32

#: Seconds that a task's stacks may take to be had from inside, where no grace bounds them, and from outside.
_STACKS_ALL: Final = 0.3
_SPY: Final = 1.0

#: Ends at which the question is where the task was stuck.
_STUCK: Final = frozenset({EndReason.WALL_TIME, EndReason.NO_PROGRESS})

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
        self._tag = tree.new_tag()
        self._evidence = Evidence(task_id=plan.task_id, name=plan.name, limits=plan.limits)
        self._answer = Answer(self._evidence, max_model_size=plan.max_model_size, on_violation=self._on_closed)
        self._watches: Watches | None = None
        self._group: MemoryGroup | None = None
        #: Path of the task's own folder; empty before there is one.
        self._scratch = ""
        self._lines: TaskLines | None = None
        #: Due once the task itself has decided its end.
        self._leaving: asyncio.TimerHandle | None = None
        #: Due when killing one process after the other takes long.
        self._last_resort: asyncio.TimerHandle | None = None
        self._child: Child | None = None
        self._stopping: asyncio.Task[None] | None = None
        #: What it was given when its turn came.
        self.place: Place | None = None
        #: Called when the process is gone, before what it leaves behind is tidied up.
        self.on_gone: Callable[[], None] | None = None
        self._outcome: asyncio.Future[Outcome] = self._loop.create_future()
        #: Done as soon as somebody wants the task to end.
        self.stop_requested: asyncio.Future[None] = self._loop.create_future()
        #: Done when the grace of a stop is called off.
        self._hurry: asyncio.Future[None] = self._loop.create_future()

    # --- For callers -----------------------------------------------------------------------------------------------

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
        tree = self._tree
        return 0 if tree is None else tree.memory.now

    @property
    def memory_peak(self) -> int:
        """The largest value of `memory_now` so far."""
        tree = self._tree
        return 0 if tree is None else tree.memory.peak

    @property
    def _tree(self) -> TreeWatch | None:
        return None if self._watches is None else self._watches.tree

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
        if not self._hurry.done():
            self._hurry.set_result(None)

    async def outcome(self) -> Outcome:
        """Wait until the task is gone with all its descendants. Cancelling the wait leaves the task alone."""
        return await asyncio.shield(self._outcome)

    def add_done_callback(self, callback: Callable[[Outcome], None]) -> None:
        """Have `callback` called with the outcome, on the loop; at once if the task is over."""
        self._outcome.add_done_callback(lambda done: callback(done.result()))

    # --- The life --------------------------------------------------------------------------------------------------

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
            await ladder.sweep(self._tag)
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
        if self._watches is not None:
            self._watches.close()
        for timer in filter(None, (self._leaving, self._last_resort)):
            timer.cancel()
        if self._lines is not None:
            self._evidence.stdout_tail, self._evidence.stderr_tail = self._lines.output()
            self._evidence.output_lost = self._lines.output_lost
        self._plan.arguments.close()
        if self.on_gone is not None:
            self.on_gone()
        await self._leave_process()

    async def _leave_process(self) -> None:
        """Give back what the process had; it is gone."""
        if self._lines is not None:
            self._lines.close()
        if self._group is not None:
            await beside(self._group.remove)
        if self._scratch:
            await self._plan.scratch.give_back(self._scratch)

    def _start(self) -> None:
        plan = self._plan
        self._lines = lines = TaskLines(
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
        self._watches = Watches(
            plan.limits,
            tag=self._tag,
            shared=packed.model_bytes + packed.memory_bytes,
            group=self._group,
            on_breach=self._on_breach,
            scratch=self._scratch,
        )
        self._child = self._launcher.start(order)
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
            self._group = plan.memory_groups.make(f"{self._tag:x}", plan.limits.memory_bytes)
        self._scratch = plan.scratch.make()
        return plan.confinement(
            tag=self._tag, group=self._group, scratch=self._scratch, holding=self._require_place().holding
        )

    async def _see_through(self) -> None:
        child, lines, watches = self._child, self._lines, self._watches
        assert child is not None
        assert lines is not None
        assert watches is not None
        strays = True
        try:
            started = await child.started
            self._evidence.start_method = started.method
            self._evidence.layers = started.layers if self._group is None else (*started.layers, self._group.NAME)
            if self._life.state is TaskState.STARTING:
                self._advance(TaskState.RUNNING)
            self._watch_process(watches, child, started.pid)
            strays = await self._until_gone(child)
        except LauncherError as error:
            self._evidence.launcher_problem = str(error)
        if self._stopping is not None:
            await self._stopping
        if strays:
            self._kill_group_later()
            exited = self._evidence.exited
            cleared = None if exited is None else exited.cleared
            self._evidence.strays_killed = await ladder.clear(self._tag, cleared)
        # What was in the socket before the end counts, however the end came.
        lines.channel.drain()
        await self._answer.checked()

    def _watch_process(self, watches: Watches, child: Child, pid: int) -> None:
        watches.process_runs(pid, child.lookout)

    async def _until_gone(self, child: Child) -> bool:
        """Wait for the end of the task's process; return whether its tree may have left something."""
        exited = await child.exited
        self._evidence.exited = exited
        if self._watches is not None:
            self._watches.catch_up()
        self._evidence.killed_by_kernel = self._tree is not None and self._tree.killed_by_kernel()
        return exited.strays

    # --- Stopping --------------------------------------------------------------------------------------------------

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
            self._kill_known()

    def _climb(self, abort_text: str, grace: float) -> None:
        if self._stopping is None:
            self._stopping = self._loop.create_task(self._climb_when_started(abort_text, grace))

    async def _climb_when_started(self, abort_text: str, grace: float) -> None:
        child, lines = self._child, self._lines
        if child is None or lines is None:
            # It was over before this began.
            return
        # Before it is started there is nothing to signal.
        waits: list[asyncio.Future[Any]] = [child.started, self._hurry]
        await asyncio.wait(waits, timeout=max(grace, _START_GRACE), return_when=asyncio.FIRST_COMPLETED)
        if not child.started.done():
            self._launcher.abandon(self.task_id)
        if self._evidence.stop is not None and self._evidence.stop.reason in _STUCK:
            await self._take_stacks(None, forcibly=grace == 0)
        await ladder.climb(
            tag=self._tag,
            grace=grace,
            ask=lambda: lines.channel.send(frames.encode(Kind.ABORT, abort_text, self.task_id)),
            not_heeded=lambda: self._take_stacks(self._loop.time() + grace / 4),
            gone=self._gone(child),
            hurry=self._hurry,
            on_stage=self._on_stage,
            kill_first=self._kill_known,
        )

    def _kill_known(self) -> None:
        """Kill what is below the first process, and what the last look has seen; the sweep finds the others."""
        self._launcher.doom(self._tag)
        self._kill_group_later()
        if self._tree is not None:
            # All at once: what they share is freed when the last of them goes, and each takes its time to go.
            below = memory.descendants(self._tree.pid, most=_MANY)
            for pid in dict.fromkeys([*below, *self._tree.pids]):
                if not tree.is_tracker(pid):
                    tree.signal_process(pid, self._tag, signal.SIGKILL)

    def _kill_group_later(self) -> None:
        """Have the kernel kill what is left when those who clean up after others have had their time."""
        if self._group is not None and self._last_resort is None:
            self._last_resort = self._loop.call_later(tree.TRACKER_GRACE, self._group.kill)

    def _gone(self, child: Child) -> asyncio.Future[Any]:
        """Return what is done once the task needs no further stopping."""
        return child.exited

    async def _take_stacks(self, until: float | None, *, forcibly: bool = True) -> None:
        """Note where the task is, once: later it is on its way out, or gone.

        `until`: when it should be done, on the loop's clock; with that, somebody is asked who looks from outside.
        `forcibly`: if it does not answer otherwise, in a way that may crash it; only once it is to be killed anyway.
        """
        seen, watched, lines = self._evidence, self._tree, self._lines
        if seen.stacks is not None or watched is None or lines is None:
            return

        def left() -> float:
            return _STACKS_ALL if until is None else max(0.0, until - self._loop.time())

        seen.stacks = await lines.take_stacks(watched.pid, self._tag, gently=True, seconds=left() / 3)
        if seen.stacks is None and forcibly:
            seen.stacks_forced = True
            seen.stacks = await lines.take_stacks(watched.pid, self._tag, gently=False, seconds=left() / 2)
        if seen.stacks is None and until is not None and left() > 0:
            seen.stacks = await lines.take_stacks_from_outside(watched.pid, self._tag, seconds=min(_SPY, left()))

    def _on_stage(self, stage: StopStage) -> None:
        self._evidence.stopped_by = stage

    def _hurry_exit(self) -> None:
        """Once the end is decided by the task itself, its process has only so long to leave."""
        self._leaving = self._loop.call_later(EXIT_GRACE, self._climb, "", 0)

    # --- What the child says -----------------------------------------------------------------------------------------

    def _on_frame(self, frame: Frame) -> None:
        self._evidence.heard = True
        if self._watches is not None:
            self._watches.sign_of_life()
        if frame.kind in messages.RECORD_KINDS:
            self._on_record(messages.parse_record(frame))
            return
        if frame.kind is Kind.PROGRESS:
            if frame.descriptors:
                close_all(frame.descriptors)
                raise ProtocolViolation("a PROGRESS frame came with descriptors")
            return
        if self._answer.came:
            close_all(frame.descriptors)
            raise ProtocolViolation(f"a {frame.kind.name} frame came after the task's end")
        if frame.kind is Kind.RESULT:
            self._answer.take_result(frame)
            self._hurry_exit()
        elif frame.kind is Kind.STATE and self._plan.state is not None:
            self._plan.state.receive(frame)
        elif frame.kind is Kind.FAILURE:
            self._answer.take_failure(frame)
            self._hurry_exit()
        else:
            close_all(frame.descriptors)
            raise ProtocolViolation(f"a task sent {frame.kind.name}")

    def _on_record(self, record: Record) -> None:
        if isinstance(record, LogLine):
            self._relay.log(record)
            return
        if isinstance(record, MetricRecord) and record.step is not None:
            self._evidence.last_step = record.step
        if self._plan.on_record is not None:
            try:
                self._plan.on_record(record)
            except Exception:
                # The listener's fault must not cost the task the frames that came with this one.
                logger.exception("a record could not be passed on", extra={"action": "record_listener_failed"})

    def _on_closed(self, violation: ProtocolViolation | None) -> None:
        if violation is not None:
            cause = StopCause(reason=EndReason.PROTOCOL, message=f"broke the rules of the control channel: {violation}")
            self._stop(cause, grace=0)

    # --- The end ---------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        seen = self._evidence
        seen.peak_memory = self.memory_peak
        report = make_report(seen)
        self._advance(TaskState.ENDED)
        if self._plan.state is not None:
            self._plan.state.settle(self.name, completed=report.completed)
        level = logging.DEBUG if report.completed else logging.WARNING
        if logger.isEnabledFor(level):
            logger.log(
                level,
                "%s",
                report.explain(),
                extra={"action": "task_ended", "task_id": self.task_id, "reason": report.reason.value},
            )
        # Whoever awaits the outcome owns the result: no cycle may keep its memory until a collection.
        value = self._answer.give()
        if not self._outcome.done():
            self._outcome.set_result(
                Outcome(report=report, value=value if report.completed else None, lent_back=self._answer.lent_back)
            )
        self._lines = self._watches = self._child = self._stopping = None
