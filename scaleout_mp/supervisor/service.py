"""The client at work: ties executor, combiner, tasks and signals together on one event loop."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.supervisor import vitals
from scaleout_mp.supervisor.callback_sources import callbacks_for
from scaleout_mp.supervisor.connecting import greeted
from scaleout_mp.supervisor.endings import JobFailedError
from scaleout_mp.supervisor.farewell import ABORT_MARGIN, Farewell, cancelled
from scaleout_mp.supervisor.jobs import JobResources
from scaleout_mp.supervisor.jobs_at_work import JobsAtWork
from scaleout_mp.supervisor.polling import Poller, follow_task_stream
from scaleout_mp.supervisor.restart import REFUSED, RESTARTING
from scaleout_mp.supervisor.shutdown import SECOND_CTRL_C, SignalReader, StopAction, signals_to
from scaleout_mp.supervisor.snapshot import ClientSnapshot
from scaleout_mp.supervisor.staged_models import StagedModels
from scaleout_mp.supervisor.systemd import ServiceManager
from scaleout_mp.supervisor.task_journal import TaskJournal, TaskStage
from scaleout_mp.supervisor.taskbook import TaskBook, TaskStatus
from scaleout_mp.transport.journal import Journal
from scaleout_mp.transport.message import MessageKind
from scaleout_mp.transport.outbox import Outbox
from scaleout_mp.wire import methods

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from google.protobuf.message import Message

    from scaleout_mp.client import EdgeClient
    from scaleout_mp.errors import TransportError
    from scaleout_mp.supervisor.autonomous import OwnTaskOrder
    from scaleout_mp.supervisor.restart import RestartOrder
    from scaleout_mp.supervisor.service_plan import ServicePlan
    from scaleout_mp.supervisor.state import StateFolder
    from scaleout_mp.task import AbortOrigin
    from scaleout_mp.transport.calls import CombinerCalls
    from scaleout_mp.transport.message import Ticket

logger = logging.getLogger(__name__)

ABORTED_BY_CLIENT: Final = "Aborted by client"


class ClientService:
    """One run of a client. Every method is called on the loop that `run` runs on, unless it says otherwise."""

    def __init__(
        self, plan: ServicePlan, client: EdgeClient, calls: CombinerCalls, state: StateFolder | None = None
    ) -> None:
        """Serve `client` over `calls`, which become the service's own.

        `state` is open, and keeps what must outlive the client; None: nothing does.
        """
        self._plan = plan
        self._calls = calls
        self._loop = asyncio.get_running_loop()
        self._core = plan.make_core()
        self._state = state
        self._journal = None if state is None else Journal(state.journal_path)
        self._tasks = TaskJournal(self._journal)
        self._outbox = Outbox(calls, self._journal, on_refused=self._on_refused)
        self._book = TaskBook(on_told=lambda task: self._tasks.told(task.correlation_id, task.status, task.response))
        callbacks = callbacks_for(plan, client, self._core, self._outbox)
        transfer = plan.make_transfer(calls)
        #: What the program itself may use, on this loop.
        self.models = StagedModels(self._core, callbacks, plan.inference, transfer.download)
        self._resources = JobResources(
            client_id=plan.client_id,
            settings=plan.settings,
            core=self._core,
            callbacks=callbacks,
            models=self.models,
            inference=plan.inference,
            transfer=transfer,
            outbox=self._outbox,
            tasks=self._tasks,
            state=state,
            restart=self._accept_restart,
        )
        self._jobs = JobsAtWork(self._resources, self._book, forgets_ended=not plan.with_polling)
        self._restart: RestartOrder | None = None
        #: Set once tasks can run, and at the end.
        self.ready = asyncio.Event()
        self._announced = False
        self._announces = plan.settings.announce
        self._manager = ServiceManager()
        self._poller = Poller(
            calls,
            self._book,
            client_id=plan.client_id,
            interval=plan.settings.polling_interval,
            on_request=self._jobs.take,
        )
        self._signals = SignalReader()
        self._end: asyncio.Future[None] = self._loop.create_future()
        self._end_now: asyncio.Future[None] = self._loop.create_future()

    # The run

    async def run(self, early: list[tuple[MessageKind, Message]], own: list[OwnTaskOrder]) -> None:
        """Serve tasks until told to end; `early` is what the program logged before, `own` the tasks that it started.

        Raises ConfigError, CallbackNotSendable and StateError, before anything is connected, when no task could
        be served.
        """
        with signals_to(self.on_signal):
            # To the very end: the tasks' grace may be longer than the watchdog's patience.
            alive = [self._loop.create_task(self._manager.give_signs_of_life(), name="watchdog")]
            try:
                if not own:
                    self._resources.callbacks.require_any()
                self._resources.callbacks.prepare_all()
                if self._journal is not None:
                    await self._journal.open()
                await self._core.start()
                await self._take_over()
                await self._resources.callbacks.open()
                self.ready.set()
                for kind, message in early:
                    self._outbox.put(kind, message)
                for order in own:
                    self._jobs.start_own(order)
                await self._serve()
                await self._unless_now(self._leave())
            finally:
                await self._clean_up()
                await cancelled(alive)
                if self.restarts:
                    self._manager.leave_time()

    async def _take_over(self) -> None:
        """Go on with what an earlier run of the client left."""
        known = await self._tasks.known()
        if self._journal is not None and self._journal.damaged and self._state is not None:
            known = await self._tasks.mended(known, self._state.notes())
        messages = await self._outbox.load()
        open_tasks = [task for task in known if task.stage not in {TaskStage.ENDED, TaskStage.TOLD}]
        for task in known:
            if task.stage is TaskStage.ENDED:
                self._book.restore(task.request, TaskStatus(task.status), task.response)
            elif task.stage is TaskStage.TOLD:
                self._book.remember(task.correlation_id, TaskStatus(task.status), task.response)
        if self._state is not None:
            self._state.sweep([task.result["update_id"] for task in open_tasks if task.stage is TaskStage.RESULT])
        if messages or open_tasks or self._book.unreported:
            logger.info(
                "going on with what an earlier run left: %d messages, %d tasks, %d ends to report",
                messages,
                len(open_tasks),
                self._book.unreported,
                extra={"action": "taken_over"},
            )
        for task in open_tasks:
            self._jobs.go_on(task)

    async def _serve(self) -> None:
        """Work until told to end. Raises what ended a loop that should not have."""
        work = [asyncio.create_task(self._take_tasks(), name="tasks")]
        work.append(asyncio.create_task(self._calls.watch_channel(), name="channel"))
        if self._plan.with_heartbeat:
            self._calls.probe = methods.SEND_HEARTBEAT
            beat = vitals.send_heartbeats(
                self._calls, client_id=self._plan.client_id, interval=self._plan.heartbeat_interval
            )
            work.append(asyncio.create_task(beat, name="heartbeat"))
        backlog = vitals.send_backlog_reports(
            self._calls, self._outbox, client_id=self._plan.client_id, interval=vitals.BACKLOG_INTERVAL
        )
        work.append(asyncio.create_task(backlog, name="backlog"))
        if self._plan.settings.send_telemetry:
            look = vitals.send_machine_telemetry(self._calls, self._outbox, client_id=self._plan.client_id)
            work.append(asyncio.create_task(look, name="telemetry"))
        self._manager.ready()
        try:
            done, _ = await asyncio.wait([*work, self._end], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await cancelled(work)

    async def _take_tasks(self) -> None:
        plan = self._plan
        if plan.settings.announce:
            self._announced = self._announces = await greeted(self._calls, client_id=plan.client_id)
        self._manager.status("connected")
        logger.info(
            "client %s is connected and waits for tasks; Ctrl-C ends it", plan.name, extra={"action": "connected"}
        )
        if plan.with_polling:
            await self._poller.run()
        else:
            await follow_task_stream(self._calls, client_id=plan.client_id, on_request=self._jobs.take)

    def _accept_restart(self, correlation_id: str, order: RestartOrder) -> None:
        """Begin to restart. Raises JobFailedError when the client cannot, or other tasks run and may not be ended."""
        others = self._jobs.others(correlation_id)
        refusal = ""
        if self._plan.cannot_restart:
            refusal = f"this client cannot restart itself: {self._plan.cannot_restart}"
        elif self._end.done():
            refusal = "this client ends, or restarts, already"
        elif others and not (order.abort_ongoing_tasks or order.force):
            refusal = f"{others} other task(s) run; abort_ongoing_tasks or force would end them"
        if refusal:
            raise JobFailedError(refusal, reason=REFUSED)
        self._restart = order
        self._jobs.farewell = RESTARTING
        self._jobs.leave()
        self._poller.skip_tasks = True
        logger.info("the server ordered a restart", extra={"action": "restart_ordered", "task_id": correlation_id})
        self._end.set_result(None)

    @property
    def restarts(self) -> bool:
        """Whether the program is to be started anew, now that `run` is over; who was told to end does not."""
        return self._restart is not None and not self._signals.ending

    def _on_refused(self, ticket: Ticket, error: TransportError) -> None:
        if ticket.kind in {MessageKind.UPDATE, MessageKind.VALIDATION}:
            self._tasks.refused(ticket.lane, str(error))

    # Control

    def abort_task(self, correlation_id: str, origin: AbortOrigin, reason: str) -> bool:
        """Ask one task to end; return whether there is such a task."""
        return self._jobs.abort(correlation_id, origin, reason)

    def start_own(self, order: OwnTaskOrder) -> None:
        """Start a task of the client's own."""
        self._jobs.start_own(order)

    def stop(self) -> None:
        """End like SIGTERM does."""
        self._act(self._signals.terminate())

    def put(self, kind: MessageKind, message: Message) -> None:
        """Send something that the program logged outside any task."""
        self._outbox.put(kind, message)

    def snapshot(self) -> ClientSnapshot:
        """Return what is to be seen now. Safe to call from any thread: it only reads."""
        counts = self._outbox.counts
        return ClientSnapshot(
            name=self._plan.name,
            client_id=self._plan.client_id,
            connected=not self._calls.link.down,
            link=self._calls.link.quality.state,
            round_trip=self._calls.link.quality.round_trip,
            pending_messages=counts.pending,
            dropped_messages=counts.dropped,
            refused_messages=counts.refused,
            deaths=tuple(self._jobs.deaths),
            tasks=self._jobs.snapshots(),
        )

    def on_signal(self, number: int) -> None:
        """Read SIGINT or SIGTERM."""
        if number == signal.SIGINT:
            self._act(self._signals.interrupt(self._loop.time(), tasks=len(self._jobs.running)))
        else:
            self._act(self._signals.terminate())

    def _act(self, action: StopAction) -> None:
        logger.debug("stop: %s", action.value, extra={"action": f"stop_{action.value}"})
        if action is StopAction.ABORT_TASKS:
            logger.warning(
                "aborting %d running task(s); press Ctrl-C again within %.0f s to end the client",
                len(self._jobs.running),
                SECOND_CTRL_C,
                extra={"action": "ctrl_c"},
            )
            self._jobs.abort_all(ABORTED_BY_CLIENT)
            return
        self._jobs.leave()
        end = self._end if action is StopAction.END else self._end_now
        if not end.done():
            end.set_result(None)

    # The end

    async def _leave(self) -> None:
        """Abort what runs, tell the server how all ended, say goodbye; neither takes longer than it may."""
        if self._restart is None:
            logger.info("the client is shutting down", extra={"action": "shutting_down"})
            self._manager.stopping()
        else:
            self._manager.restarting()
        farewell = Farewell(
            self._calls,
            self._outbox,
            self._poller,
            self._jobs.running,
            polls=self._plan.with_polling,
            within=self._plan.goodbye_seconds,
        )
        if self._restart is not None and self._restart.force:
            await self._kill_all()
        else:
            self._jobs.abort_all(self._jobs.farewell)
            await farewell.until_reporting(self._plan.limits.abort_grace_seconds + ABORT_MARGIN)
        # Who never came need not say that it goes; a greeting that was cut off may have arrived.
        # Who restarts is soon back.
        came = self._restart is None and self._announces and (self._announced or not self._calls.link.down)
        await farewell.say(self._plan.client_id if came else None)

    async def _kill_all(self) -> None:
        """End all tasks at once; the order to restart is none of them."""
        await self._jobs.cut_off(spare_restart=True)
        await self._core.aclose(kill=True)

    async def _unless_now(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        try:
            await asyncio.wait([task, self._end_now], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        finally:
            await cancelled([task])

    async def _clean_up(self) -> None:
        self._jobs.close()
        self.ready.set()
        self._jobs.abort_all(self._jobs.farewell)
        await self._poller.aclose()
        await self._jobs.cut_off()
        await self._resources.callbacks.aclose()
        await self._core.aclose(kill=self._end_now.done())
        await self.models.aclose()
        await self._outbox.aclose()
        await self._calls.aclose()
        if self._journal is not None:
            await self._journal.aclose()
        self._jobs.release()
