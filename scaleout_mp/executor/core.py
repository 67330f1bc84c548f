"""The executor on an event loop: what a supervisor builds on, and `TaskExecutor` wraps."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.config import Limits, Resources, Sandbox, Surroundings
from scaleout_mp.config.checks import parse_modules, require_flag, require_kind, require_name, shown
from scaleout_mp.config.limits import parse_size
from scaleout_mp.config.resources import parse_gpus, parse_memory_budget
from scaleout_mp.config.sandbox import Level, LevelName, as_sandbox
from scaleout_mp.errors import ConfigError, ExecutorClosedError
from scaleout_mp.executor.execution import Execution
from scaleout_mp.executor.output import OutputRelay
from scaleout_mp.executor.plan import ExecutionPlan
from scaleout_mp.executor.resident_execution import ResidentExecution
from scaleout_mp.executor.residents import ResidentPool
from scaleout_mp.executor.scheduling import NOTHING, Demand, Ledger, Line, Place
from scaleout_mp.executor.scratch import ScratchKeeper
from scaleout_mp.executor.states import MAX_STATE, StateStore
from scaleout_mp.executor.template import StartMethod, TemplateLauncher
from scaleout_mp.executor.template_start import TemplatePlace
from scaleout_mp.ipc import arguments, callables
from scaleout_mp.ipc.callables import PreparedCallable
from scaleout_mp.sandbox import environment
from scaleout_mp.sandbox.cgroup import MemoryGroups, find_tree_group, remove_left_over
from scaleout_mp.sandbox.confinement import TEMP_VARIABLES
from scaleout_mp.sandbox.shield import Shield
from scaleout_mp.task import AbortOrigin, Record, TaskState, require_not_loading

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scaleout_mp.executor.interpreter import Interpreter
    from scaleout_mp.executor.launcher import Launcher
    from scaleout_mp.executor.residents import WorkerSpec
    from scaleout_mp.ipc.arguments import PackedArguments
    from scaleout_mp.sandbox.tree_group import TreeGroup

logger = logging.getLogger(__name__)

#: Modules that the template imports before its first task.
PRELOAD: Final = ("numpy", "scaleout_mp.model")
#: Bytes; a returned model that is larger is not taken.
MAX_MODEL_SIZE: Final = 64 * 2**30


def parse_state_bytes(state_bytes: int | str) -> int:
    """Return the bound of a state in bytes. Raises ConfigError."""
    size = parse_size(state_bytes, field="state_bytes")
    if size < 0:
        raise ConfigError(f"state_bytes must be at least 0 bytes, not {shown(state_bytes)}")
    return size


def default_concurrency() -> int:
    """Return how many tasks run at once unless somebody says otherwise."""
    return max(4, os.cpu_count() or 1)


def check_order(*, limits: object, resources: object, name: object, state: object) -> None:
    """Check what a task is ordered with. Raises ConfigError that names the field."""
    require_kind(Limits, limits=limits)
    require_kind(Resources, resources=resources)
    require_name(state=state)
    if name != "":
        require_name(name=name)


class ExecutorCore:
    """Runs callables in confined processes. Every method is called on one event loop.

    `launcher` replaces the template process; it is given by who runs tasks elsewhere.
    """

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        start_method: StartMethod = "template",
        sandbox: Sandbox | LevelName = "auto",
        preload: Sequence[str] = PRELOAD,
        memory_budget: float | str | None = None,
        gpus: Sequence[int | str] | None = None,
        resources: Resources | None = None,
        state_bytes: int | str = MAX_STATE,
        max_concurrent_tasks: int | None = None,
        echo_output: bool = True,
        surroundings: Surroundings | None = None,
        launcher: Launcher | None = None,
    ) -> None:
        if start_method not in {"template", "spawn"}:
            raise ConfigError(f'start_method must be "template" or "spawn", not {start_method!r}')
        most = default_concurrency() if max_concurrent_tasks is None else max_concurrent_tasks
        if type(most) is not int or most < 1:
            raise ConfigError(f"max_concurrent_tasks must be a whole number above 0, not {shown(most)}")
        require_kind(Limits, limits=limits)
        require_kind(Resources, resources=resources)
        require_flag("echo_output", echo_output)
        modules = parse_modules("preload", preload)
        self._sandbox = as_sandbox(sandbox)
        self._unconfined = Level(self._sandbox.level) is Level.NONE
        self._limits = limits or Limits()
        self._surroundings = surroundings or Surroundings()
        self._scratch = ScratchKeeper(self._surroundings.scratch_folder)
        self._shield = Shield()
        self._launcher = launcher or TemplateLauncher(
            start_method=start_method,
            preload=modules,
            sandbox=self._sandbox,
            threads=self._limits.threads,
            place=self._template_place,
        )
        self._echo = echo_output
        self._relay = OutputRelay()
        self._resources = resources or Resources()
        self._ledger = Ledger(slots=most, memory=parse_memory_budget(memory_budget), gpus=parse_gpus(gpus))
        self._shares_gpus = gpus is not None
        self._residents = ResidentPool()
        self._line = self._residents.line = Line(self._ledger, self._residents)
        self._states = StateStore(parse_state_bytes(state_bytes))
        self._running: dict[Execution, asyncio.Task[None]] = {}
        self._groups: MemoryGroups | None = None
        self._tree_group: TreeGroup | None = None
        self._closing = False

    async def start(self) -> None:
        """Start the launcher and wait until it is ready. Raises LauncherError, ConfigError and ImportedForTaskError."""
        require_not_loading("runs tasks")
        await self._scratch.open()
        try:
            if self._surroundings.shield:
                self._shield.put_on()
            self._find_groups()
            await self._launcher.open()
        except BaseException:
            await self._let_go()
            raise

    @property
    def missing_layers(self) -> tuple[str, ...]:
        """What this machine refuses of the level that was asked for, and why: one sentence each."""
        return self._launcher.missing_layers

    def _find_groups(self) -> None:
        try:
            self._groups = MemoryGroups.find()
            remove_left_over(self._groups.base)
        except OSError as error:
            logger.debug("memory limits are kept by the watchdog: %s", error, extra={"action": "no_memory_cgroup"})
        try:
            self._tree_group = find_tree_group(self._groups)
            remove_left_over(self._tree_group.folder)
        except OSError as error:
            logger.debug("no tree of processes is held still: %s", error, extra={"action": "no_tree_group"})

    def _template_place(self) -> TemplatePlace:
        around, base = self._surroundings, self._scratch.folders.path
        passed = os.environ if self._unconfined else environment.scrub(os.environ, around.pass_environment)
        own_folder = dict.fromkeys(TEMP_VARIABLES, self._scratch.template_folder())
        start = self._start_folder(base)
        return TemplatePlace(
            environment={**passed, **around.environment, **own_folder},
            scratch=base,
            shared=() if self._groups is None else (self._groups.base,),
            group=self._tree_group,
            start_folder=None if start == base else start,
        )

    def _start_folder(self, scratch: str) -> str:
        return self._surroundings.start_folder(scratch, inherit=self._unconfined)

    @staticmethod
    def prepare(function: Callable[..., Any]) -> PreparedCallable:
        """Pickle a callable once, for many tasks. Raises CallbackNotSendable that names the culprit."""
        return callables.prepare(function)

    def submit(
        self,
        function: Callable[..., Any] | PreparedCallable,
        /,
        *args: Any,
        task_id: str | None = None,
        name: str | None = None,
        limits: Limits | None = None,
        resources: Resources | None = None,
        worker: WorkerSpec | None = None,
        state: str | None = None,
        place: Place | None = None,
        on_record: Callable[[Record], None] | None = None,
        on_state: Callable[[TaskState], None] | None = None,
        **kwargs: Any,
    ) -> Execution:
        """Order a task; it starts when its turn comes, in a process of its own or in a worker.

        `on_record` gets what the task logs, in order and before the outcome; `on_state` each state after PENDING.
        `state` names what the task finds in `current_task().state` and hands on to the next one that names it.
        `place` is one whose turn has come, for the same limits, resources and worker.
        Raises CallbackNotSendable, ValueNotSendable, and ConfigError that names the field.
        """
        check_order(limits=limits, resources=resources, name=name, state=state)
        call = function if isinstance(function, PreparedCallable) else callables.prepare(function)
        return self.submit_packed(
            call,
            arguments.pack(args, kwargs),
            task_id=task_id,
            name=name,
            limits=limits,
            resources=resources,
            worker=worker,
            state=state,
            place=place,
            on_record=on_record,
            on_state=on_state,
        )

    def submit_packed(
        self,
        call: PreparedCallable,
        packed: PackedArguments,
        *,
        task_id: str | None = None,
        name: str | None = None,
        limits: Limits | None = None,
        resources: Resources | None = None,
        worker: WorkerSpec | None = None,
        state: str | None = None,
        place: Place | None = None,
        on_record: Callable[[Record], None] | None = None,
        on_state: Callable[[TaskState], None] | None = None,
    ) -> Execution:
        """Order a task whose arguments were packed before, on another thread for example. Takes them over."""
        if self._closing:
            packed.close()
            raise ExecutorClosedError
        plan = ExecutionPlan(
            task_id=task_id or uuid.uuid4().hex,
            name=name or call.name,
            call=call,
            arguments=packed,
            limits=limits or self._limits,
            resources=resources or self._resources,
            shares_gpus=self._shares_gpus,
            max_model_size=MAX_MODEL_SIZE,
            memory_groups=self._groups,
            scratch=self._scratch,
            start_folder=self._start_folder,
            worker=worker,
            state=None if state is None else self._states.slot(state),
            on_record=on_record,
            on_state=on_state,
        )
        execution = self._execution(plan)
        execution.place = place
        task = asyncio.get_running_loop().create_task(self._run(execution), name=f"task {plan.task_id}")
        self._running[execution] = task
        task.add_done_callback(lambda _: self._running.pop(execution, None))
        return execution

    def _execution(self, plan: ExecutionPlan) -> Execution:
        if plan.worker is None:
            return Execution(plan, self._launcher, self._relay, echo=self._echo)
        return ResidentExecution(plan, self._launcher, self._relay, echo=self._echo, pool=self._residents)

    def retire_worker(self, name: str) -> None:
        """End the processes of a worker that have nothing to do: they are not needed any more."""
        self._residents.retire(name)

    async def renew(self, interpreter: Interpreter) -> None:
        """Run tasks that are ordered from now on in `interpreter`, which has loaded nothing of what was sent before.

        Those that run go on. Raises LauncherError.
        """
        await self._launcher.renew(interpreter)

    # Turns

    def line_up(
        self,
        *,
        limits: Limits | None = None,
        resources: Resources | None = None,
        worker: WorkerSpec | None = None,
    ) -> Place:
        """Get in line for a task that is submitted once its turn has come; `leave` gives the place up again.

        Raises ConfigError when its turn could never come.
        """
        place = self._place(limits or self._limits, resources or self._resources, worker)
        refusal = self._line.refusal(place)
        if refusal is not None:
            raise ConfigError(f"a task {refusal}")
        self._line.enter(place)
        return place

    def line_up_for_slot(self) -> Place:
        """Get in line for work that needs no process, only its turn."""
        place = Place(demand=Demand(), worker=None, fits=lambda _: False)
        self._line.enter(place)
        return place

    @staticmethod
    def place_apart() -> Place:
        """Return a place outside the line, with nothing of the machine, for a task that those in line wait for."""
        return Place(demand=Demand(), worker=None, fits=lambda _: False, holding=NOTHING, at_work=True)

    @staticmethod
    async def turn(place: Place) -> None:
        """Wait for a place's turn."""
        if not place.at_work:
            if place.turn is None:
                place.turn = asyncio.get_running_loop().create_future()
            await asyncio.shield(place.turn)

    def leave(self, place: Place) -> None:
        """Give up a place, whether its turn has come or not. The task in it must be over."""
        self._line.leave(place)

    def _place(self, limits: Limits, resources: Resources, worker: WorkerSpec | None) -> Place:
        return Place(
            demand=self._ledger.demand(limits, resources),
            worker=worker,
            fits=lambda resident: worker is not None and resident.serves(worker, limits, resources),
        )

    async def _run(self, execution: Execution) -> None:
        try:
            await self._run_in_turn(execution)
        except Exception as error:  # noqa: BLE001 - it is in the log, and in the outcome that somebody waits for
            execution.give_up(error)

    async def _run_in_turn(self, execution: Execution) -> None:
        if execution.place is not None:
            await execution.run()
            return
        place = execution.place = self._place(execution.limits, execution.resources, execution.worker)
        refusal = self._line.refusal(place)
        if refusal is not None:
            execution.refuse(refusal)
            await execution.run()
            return
        self._line.enter(place)
        left = False

        def leave() -> None:
            nonlocal left
            if not left:
                left = True
                self._line.leave(place)

        if execution.worker is None:
            # The next one need not wait until a folder is removed.
            execution.on_gone = leave
        try:
            if not place.at_work:
                place.turn = asyncio.get_running_loop().create_future()
                first: list[asyncio.Future[Any]] = [place.turn, execution.stop_requested]
                await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            await execution.run()
        finally:
            leave()

    async def wait_idle(self) -> None:
        """Wait until no task is pending or running."""
        while self._running:
            await asyncio.wait(list(self._running.values()))

    async def aclose(self, reason: str = "the executor is closing", *, kill: bool = False) -> None:
        """Abort what runs, wait until every tree is gone, end the launcher. `kill`: without any grace.

        May be called again, to kill what an earlier call waits for.
        """
        self._closing = True
        for execution in list(self._running):
            execution.abort(AbortOrigin.CLIENT, reason)
            if kill:
                execution.kill()
        await self.wait_idle()
        await self._residents.aclose()
        await self._let_go(at_once=kill)
        self._states.close()
        self._relay.close()

    async def _let_go(self, *, at_once: bool = False) -> None:
        await self._launcher.close()
        tree_group, self._tree_group = self._tree_group, None
        if tree_group is not None:
            try:
                tree_group.remove()
            except OSError as error:
                logger.warning("cannot remove %s: %s", tree_group.folder, error, extra={"action": "cgroup_left"})
        groups, self._groups = self._groups, None
        if groups is not None:
            groups.close()
        self._shield.take_off()
        await self._scratch.aclose(at_once=at_once)
