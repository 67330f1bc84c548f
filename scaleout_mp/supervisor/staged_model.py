"""One model that is staged: its worker, whose turn in it is, and how often it died."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import weakref
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.client.calls import RequestInfo
from scaleout_mp.client.inference_calls import INFERENCE, STAGE_MODEL
from scaleout_mp.config.limits import parse_seconds
from scaleout_mp.errors import ConfigError, StagingError
from scaleout_mp.executor import SetUp, WorkerSpec
from scaleout_mp.ipc import arguments
from scaleout_mp.supervisor.worker_trouble import WorkerTrouble
from scaleout_mp.task import AbortOrigin, EndReason

if TYPE_CHECKING:
    from collections.abc import Callable

    from scaleout_mp.config import Limits
    from scaleout_mp.executor import Execution, ExecutorCore, Outcome, PreparedCallable
    from scaleout_mp.ipc.arguments import PackedArguments
    from scaleout_mp.model import ScaleoutModel
    from scaleout_mp.task import ExitReport, Record

logger = logging.getLogger(__name__)

#: Seconds that requests wait for a worker which is left alone for the moment; for longer than that they are refused.
_PATIENCE: Final = 2.0
#: Ends that say nothing about the worker: somebody wanted the request gone.
_INTERRUPTIONS: Final = frozenset(
    {EndReason.INTERRUPTED_BY_SERVER, EndReason.TIMED_OUT_BY_SERVER, EndReason.INTERRUPTED_BY_CLIENT}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferencePlan:
    """How models are staged and asked."""

    #: The folder of `<model_id>.scm` files.
    cache_dir: str
    #: Requests to one model that run at once, each in a process that has staged it.
    processes: int
    #: Seconds without a request after which a model's processes are ended; None: never.
    idle_seconds: float | None
    #: Of each request.
    limits: Limits
    #: Of staging; those of the process are the same as of a request.
    staging_limits: Limits


def inference_plan(
    *, cache_dir: str, concurrency: int, idle_time: float | str | None, limits: Limits, request_limits: Limits | None
) -> InferencePlan:
    """Check what a user says of inference. `limits` are those of all tasks. Raises ConfigError that names the field."""
    if type(concurrency) is not int or concurrency < 1:
        raise ConfigError(f"inference_concurrency must be a whole number above 0, not {concurrency!r}")
    idle = None if idle_time is None else parse_seconds(idle_time, field="inference_idle_time")
    if idle is not None and not idle >= 0:
        raise ConfigError(f"inference_idle_time must be at least 0 seconds, not {idle_time!r}")
    request_limits = request_limits or limits
    return InferencePlan(
        cache_dir=cache_dir,
        processes=concurrency,
        idle_seconds=idle,
        limits=request_limits,
        # Loading a model may take longer than asking it.
        staging_limits=dataclasses.replace(
            request_limits, wall_time=limits.wall_time, no_progress=limits.no_progress, cpu_time=limits.cpu_time
        ),
    )


class StagedModel:
    """On the executor's event loop. Whoever uses it holds it by `StagedModels`."""

    def __init__(self, key: str, model: ScaleoutModel, core: ExecutorCore, plan: InferencePlan) -> None:
        """Take over `model`."""
        self.key = key
        self.users = 0
        #: On the loop's clock; as of when nobody uses it.
        self.idle_since = 0.0
        self._model = model
        self._core = core
        self._plan = plan
        self._turns = asyncio.Semaphore(plan.processes)
        self._trouble = WorkerTrouble()
        #: By the key of the callbacks: those may be replaced while requests run.
        self._workers: dict[str, WorkerSpec] = {}
        self._given: weakref.ref[ScaleoutModel] | None = None

    @property
    def worker_name(self) -> str:
        """The name of its worker, for people and in reports."""
        return f"model {self.key}"

    @property
    def model(self) -> ScaleoutModel:
        """The model itself."""
        return self._model

    def was_given(self, model: ScaleoutModel) -> bool:
        """Whether it is known to have the contents of a model."""
        return self._given is not None and self._given() is model

    def is_made_of(self, model: ScaleoutModel) -> bool:
        """Whether a model has the same contents. May read all of both; on a thread."""
        if self.was_given(model):
            return True
        if self._model.size != model.size or self._model.checksum != model.checksum:
            return False
        self._given = weakref.ref(model)
        return True

    def made_of(self, model: ScaleoutModel) -> None:
        """Note whose contents it has."""
        self._given = weakref.ref(model)

    def worker(self, call: PreparedCallable) -> WorkerSpec:
        """Return the worker that has staged the model with these callbacks. Raises OSError."""
        spec = self._workers.get(call.key)
        if spec is None:
            request = RequestInfo(type=STAGE_MODEL, correlation_id="", model_id=self.key, round_id="", session_id="")
            set_up = SetUp(
                call=dataclasses.replace(call, name="the stage callback"),
                arguments=arguments.pack((STAGE_MODEL, self._model, request), {}),
                limits=self._plan.staging_limits,
            )
            spec = self._workers[call.key] = WorkerSpec(
                name=self.worker_name,
                processes=self._plan.processes,
                idle_seconds=self._plan.idle_seconds,
                set_up=set_up,
                edition=call.key,
            )
        return spec

    # Turns

    async def turn(self) -> None:
        """Wait for a turn, in the order of arrival, and until the worker is worth a try.

        Raises StagingError when that would take long: it has died again and again.
        """
        await self._turns.acquire()
        try:
            wait = self._trouble.wait(asyncio.get_running_loop().time())
            if wait > _PATIENCE:
                raise StagingError(  # noqa: TRY301
                    f"model {self.key}: its worker died {self._trouble.deaths} times in a row and is tried again in "
                    f"{wait:.0f} s; the last time: {self._trouble.said}"
                )
            if wait:
                await asyncio.sleep(wait)
        except BaseException:
            self._turns.release()
            raise

    def leave(self) -> None:
        """Give up a turn."""
        self._turns.release()

    def note(self, execution: Execution, report: ExitReport) -> None:
        """Learn from how a request ended."""
        if execution.worker_stays:
            self._trouble.lived()
        elif report.reason not in _INTERRUPTIONS:
            now = asyncio.get_running_loop().time()
            self._trouble.died(report.message, now, ready=execution.worker_was_set_up)
            if self._trouble.deaths > 1:
                logger.warning(
                    "model %s: its worker died %d times in a row; it is left alone for %.2g s",
                    self.key,
                    self._trouble.deaths,
                    self._trouble.wait(now),
                    extra={"action": "worker_left_alone", "model_id": self.key},
                )

    async def ask(
        self,
        call: PreparedCallable,
        packed: PackedArguments,
        *,
        task_id: str,
        name: str,
        on_record: Callable[[Record], None] | None,
    ) -> Outcome:
        """Have the worker do one thing, when it is its turn. Takes over `packed`. Raises StagingError."""
        try:
            await self.turn()
        except BaseException:
            packed.close()
            raise
        try:
            execution = self._core.submit_packed(
                call,
                packed,
                task_id=task_id,
                name=name,
                limits=self._plan.limits,
                worker=self.worker(call),
                on_record=on_record,
            )
            try:
                outcome = await execution.outcome()
            except asyncio.CancelledError:
                execution.abort(AbortOrigin.CLIENT)
                # What comes next must not find the worker busy with something that nobody waits for.
                await execution.outcome()
                raise
            self.note(execution, outcome.report)
            return outcome
        finally:
            self.leave()

    def close(self) -> None:
        """Give the model back. Nothing of it may run any more, or begin."""
        for spec in self._workers.values():
            if spec.set_up is not None:
                spec.set_up.arguments.close()
        self._workers.clear()
        self._model.close()


def staging_arguments() -> tuple[Any, ...]:
    """Return the arguments of a task that only sees to it that a process has staged its model."""
    request = RequestInfo(type=STAGE_MODEL, correlation_id="", model_id="", round_id="", session_id="")
    return STAGE_MODEL, None, request


def inference_arguments(parameters: Any, request: RequestInfo) -> tuple[Any, ...]:
    """Return the arguments of a request whose result is wanted as it is; none of ours needs to be pickled."""
    return INFERENCE, parameters, False, dataclasses.asdict(request)
