"""The executor for scripts and notebooks: blocking calls, an event loop on a thread behind them."""

from __future__ import annotations

import concurrent.futures
import os
import threading
import uuid
from typing import TYPE_CHECKING, Any, Final, Self

from scaleout_mp.config import Limits, Resources, Surroundings
from scaleout_mp.config.checks import require_kind
from scaleout_mp.executor import standard
from scaleout_mp.executor.core import PRELOAD, ExecutorCore, check_order
from scaleout_mp.executor.loop_thread import LoopThread
from scaleout_mp.executor.record_queue import RecordQueue
from scaleout_mp.executor.residents import IDLE_SECONDS
from scaleout_mp.executor.states import MAX_STATE
from scaleout_mp.executor.worker_handle import Worker, WorkerOptions, check_isolation, pack_set_up
from scaleout_mp.ipc import arguments, callables
from scaleout_mp.task import AbortOrigin, ExitReport, Record, TaskState, require_not_loading

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from scaleout_mp.config import Sandbox
    from scaleout_mp.config.sandbox import LevelName
    from scaleout_mp.executor.execution import Execution
    from scaleout_mp.executor.plan import Outcome
    from scaleout_mp.executor.residents import WorkerSpec
    from scaleout_mp.executor.template import StartMethod
    from scaleout_mp.executor.worker_handle import Isolation
    from scaleout_mp.ipc.callables import PreparedCallable

_ELSEWHERE: Final = "the executor belongs to the process that this one was forked from; make one here"

#: Seconds for killing what runs, when nobody wants to wait.
_KILL_SECONDS: Final = 5.0


class Task:
    """One submitted task. Every method may be called from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, task_id: str, name: str) -> None:
        #: The id of the task; it is in every log record and in the report.
        self.task_id = task_id
        #: What runs, for people.
        self.name = name
        self._loop = loop
        self._pid = os.getpid()
        #: None before the loop has heard of the task, and once it is over: both refer to each other, and the result
        #: would stay until the next collection.
        self._execution: Execution | None = None
        self._records = RecordQueue()
        self._outcome: concurrent.futures.Future[Outcome] = concurrent.futures.Future()

    def __repr__(self) -> str:
        return f"<Task {self.name} {self.task_id} {self.state}>"

    @property
    def state(self) -> TaskState:
        """Where the task is in its life."""
        execution = self._execution
        if execution is not None:
            return execution.state
        return TaskState.ENDED if self.done() else TaskState.PENDING

    @property
    def memory_peak(self) -> int:
        """Bytes of private memory of the task's tree, the largest value seen so far."""
        execution = self._execution
        if execution is not None:
            return execution.memory_peak
        return (self.report().peak_memory or 0) if self.done() else 0

    def done(self) -> bool:
        """Whether the task is gone and its report is there."""
        return self._outcome.done()

    def records(self) -> Iterator[Record]:
        """Yield what the task logs, as it comes, until the task is over. Each record is yielded once.

        Of what nobody reads, some 12 MiB wait; then the oldest go, which the log says.
        """
        yield from self._records

    def result(self, timeout: float | None = None) -> Any:
        """Wait for what the callable returned.

        Raises TaskFailed, TaskCrashed, TaskKilled or TaskRefused, each with the ExitReport as `report`, and
        TimeoutError when the task is not over after `timeout` seconds; the task then goes on.
        """
        outcome = self._wait(timeout)
        if outcome.report.completed:
            return outcome.value
        raise outcome.report.to_error()

    def report(self, timeout: float | None = None) -> ExitReport:
        """Wait for the end, whatever it is, and return its report. Raises TimeoutError."""
        return self._wait(timeout).report

    def _wait(self, timeout: float | None) -> Outcome:
        if self._pid != os.getpid() and not self.done():
            # A fork of the program has no thread that would ever hear of the end.
            raise RuntimeError(_ELSEWHERE)
        return self._outcome.result(timeout)

    def abort(self, reason: str = "") -> None:
        """Ask the task to stop; it is killed when its grace is over. Returns at once."""
        if not self.done():
            self._loop.call_soon_threadsafe(self._abort, reason)

    # --- Called on the loop ------------------------------------------------------------------------------------------

    def _on_record(self, record: Record) -> None:
        self._records.put(record)

    def _abort(self, reason: str) -> None:
        if self._execution is not None:
            self._execution.abort(AbortOrigin.CLIENT, reason)

    def _begin(self, execution: Execution) -> None:
        self._execution = execution
        execution.add_done_callback(self._finish)

    def _refuse(self, error: Exception) -> None:
        self._outcome.set_exception(error)
        self._records.end()

    def _finish(self, outcome: Outcome) -> None:
        self._outcome.set_result(outcome)
        self._execution = None
        self._records.end()


class TaskExecutor:
    """Runs callables in processes of their own, with limits, and says how each one ended.

    Use it as a context manager; on the way out it waits for running tasks, or aborts them after an exception.
    `limits` and `resources` are the default of every task. At most `max_concurrent_tasks` run at once, and only as many
    as have memory limits whose sum is within `memory_budget` (a size, or a fraction of the machine); others wait.
    `gpus` are the GPUs that tasks get by `Resources(gpus=...)`. `isolation` is "task" (a fresh process for each) or
    "worker" (for each callable one that stays and keeps its state), see docs/isolation.md; `state_bytes` bounds each
    state that tasks hand on. `start_method` is "template" (fork from a warm interpreter, about a millisecond) or
    "spawn" (a fresh interpreter each time). `sandbox` is "auto", "none", "basic", "strict" or a `Sandbox`, see
    docs/security.md. `preload` names modules that the template imports once. `echo_output` passes on what tasks print.
    A task starts in an empty folder of its own, which goes with it; `scratch_folder` is where these folders are made,
    and `working_directory` where tasks start instead: "inherit", where the program stands, or a path. Of the program's
    environment a task gets what is on an allow list and what `pass_environment` names, and `environment` in addition;
    see docs/security.md. `shield` closes the program to debuggers, and to tasks that would read its memory or
    environment.
    """

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        start_method: StartMethod = "template",
        sandbox: Sandbox | LevelName = "auto",
        preload: Sequence[str] = PRELOAD,
        isolation: Isolation = "task",
        state_bytes: int | str = MAX_STATE,
        memory_budget: float | str | None = None,
        gpus: Sequence[int | str] | None = None,
        resources: Resources | None = None,
        max_concurrent_tasks: int | None = None,
        echo_output: bool = True,
        scratch_folder: str | os.PathLike[str] | None = None,
        working_directory: str | os.PathLike[str] | None = None,
        environment: Mapping[str, str] | None = None,
        pass_environment: Sequence[str] = (),
        shield: bool = False,
    ) -> None:
        self._core = ExecutorCore(
            limits=limits,
            start_method=start_method,
            sandbox=sandbox,
            preload=preload,
            state_bytes=state_bytes,
            memory_budget=memory_budget,
            gpus=gpus,
            resources=resources,
            max_concurrent_tasks=max_concurrent_tasks,
            echo_output=echo_output,
            surroundings=Surroundings(
                scratch_folder=scratch_folder,
                working_directory=working_directory,
                environment={} if environment is None else environment,
                pass_environment=pass_environment,
                shield=shield,
            ),
        )
        check_isolation(isolation)
        self._isolation = isolation
        self._workers: list[Worker] = []
        self._thread: LoopThread | None = None
        self._closed = False
        # A signal handler may shut it down where the code that it interrupts holds this.
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException:
            # Ctrl-C between the start and here: `with` does not call `__exit__` then.
            self.shutdown(abort=True)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.shutdown(abort=kind is not None)

    def submit(
        self,
        function: Callable[..., Any],
        /,
        *args: Any,
        limits: Limits | None = None,
        resources: Resources | None = None,
        name: str | None = None,
        worker: str | Worker | None = None,
        state: str | None = None,
        **kwargs: Any,
    ) -> Task:
        """Order a task: `function(*args, **kwargs)` in a process of its own, or in the one of a worker.

        `worker` is the name of a process that stays: it runs its tasks in order and keeps what they leave in it. With
        `isolation="worker"` each callable has one that is named after it. `state` names a dict, `current_task().state`,
        that the task hands on to the next one with the same name, if it completes.

        Arguments may be models, which are handed over without a copy, and whatever pickles. The callable returns
        models, numpy arrays, numbers, strings, and lists, tuples and dicts of them. Raises CallbackNotSendable,
        which names the captured object, ValueNotSendable, which names the argument, and ConfigError, which names the
        field.
        """
        check_order(limits=limits, resources=resources, name=name, state=state)
        loop = self._open()
        # Pickled here: a large closure must not hold up the loop, and errors belong to the caller.
        call = callables.prepare(function)
        packed = arguments.pack(args, kwargs)
        spec = self._worker_spec(worker, call)
        task = Task(loop, uuid.uuid4().hex, name or call.name)

        def begin() -> None:
            try:
                task._begin(  # noqa: SLF001 - the other half of this class
                    self._core.submit_packed(
                        call,
                        packed,
                        task_id=task.task_id,
                        name=task.name,
                        limits=limits,
                        resources=resources,
                        worker=spec,
                        state=state,
                        on_record=task._on_record,  # noqa: SLF001
                    )
                )
            except Exception as error:  # noqa: BLE001 - it is raised where the result is waited for
                # Shut down from another thread in between, most likely.
                task._refuse(error)  # noqa: SLF001

        # Nobody waits for it: a switch of threads here would cost a tenth of the task's start.
        loop.call_soon_threadsafe(begin)
        return task

    def worker(
        self,
        name: str,
        *,
        set_up: Callable[..., Any] | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        resources: Resources | None = None,
        processes: int = 1,
        idle_time: float | str | None = IDLE_SECONDS,
    ) -> Worker:
        """Return a worker, which starts with its first task and, before that, calls `set_up(*args, **kwargs)`.

        `limits` and `resources` hold for its processes and its tasks. `processes` tasks may run at once, each in a
        process with state of its own. `idle_time` is the time without a task, in seconds or as "10m", after which one
        is ended; None: never. Raises ConfigError, CallbackNotSendable and ValueNotSendable.
        """
        require_kind(Limits, limits=limits)
        require_kind(Resources, resources=resources)
        options = WorkerOptions(name=name, processes=processes, idle_time=idle_time)
        spec = options.spec(pack_set_up(set_up, args, kwargs))
        made = Worker(self, spec, limits, resources, set_up=set_up)
        with self._lock:
            self._workers.append(made)
        return made

    def retire_worker(self, name: str) -> None:
        """End the processes of a worker that have nothing to do."""
        if self._thread is not None and not self._closed:
            self._thread.loop.call_soon_threadsafe(self._core.retire_worker, name)

    def _worker_spec(self, worker: str | Worker | None, call: PreparedCallable) -> WorkerSpec | None:
        if isinstance(worker, Worker):
            return worker.spec
        if worker is None and self._isolation == "task":
            return None
        return WorkerOptions(name=call.name if worker is None else worker).spec()

    @property
    def missing_layers(self) -> tuple[str, ...]:
        """What this machine refuses of the level that was asked for, and why: one sentence each.

        What is in force instead is in the report of each task.
        """
        self._open()
        return self._core.missing_layers

    def shutdown(self, *, abort: bool = False) -> None:
        """Wait for running tasks, or abort them first, and end the template. Later calls do nothing.

        Nor do those of a fork of this process: what runs is not its own.
        """
        thread = None
        try:
            with self._lock:
                before, self._closed = self._closed, True
                thread = None if before or self._thread is None or self._thread.is_elsewhere else self._thread
            if thread is not None:
                thread.run(self._close(abort=abort))
        except KeyboardInterrupt:
            # While it waits for tasks: stop them, and see that through.
            if thread is not None:
                self._stop_tasks(thread)
            raise
        finally:
            if thread is not None:
                thread.close()
                for worker in self._workers:
                    worker.close()

    def _stop_tasks(self, thread: LoopThread) -> None:
        try:
            thread.run(self._core.aclose("Ctrl-C"))
        except KeyboardInterrupt:
            # Again: no more grace.
            thread.run(self._core.aclose("Ctrl-C", kill=True), _KILL_SECONDS)
            raise

    async def _close(self, *, abort: bool) -> None:
        if not abort:
            await self._core.wait_idle()
        await self._core.aclose()

    async def _end(self) -> None:
        await self._core.aclose("interrupted", kill=True)

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("the executor is shut down")

    def _open(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._thread is not None and self._thread.is_elsewhere:
                raise RuntimeError(_ELSEWHERE)
            self._require_open()
            if self._thread is None:
                # A process with a thread could not be forked from.
                require_not_loading("runs tasks")
                # Before the event loop's own descriptors.
                standard.fill_missing()
                thread = LoopThread(start=self._core.start, end=self._end)
                try:
                    thread.open()
                    # It may be by now: by a signal handler.
                    self._require_open()
                    self._thread = thread
                except BaseException:
                    # Ctrl-C, say, after which nobody has an executor to shut down.
                    self._closed = True
                    thread.give_up()
                    raise
            return self._thread.loop
