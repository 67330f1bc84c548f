"""One job of `scaleout-mp run`: start it, show it, stop it on Ctrl-C."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
from typing import TYPE_CHECKING, Any, Final, Literal

from scaleout_mp.executor import ExecutorCore
from scaleout_mp.task import AbortOrigin

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scaleout_mp.cli.job_view import View
    from scaleout_mp.client.target import Target
    from scaleout_mp.config import Limits, Resources, Sandbox, Surroundings
    from scaleout_mp.executor import Execution
    from scaleout_mp.model import ScaleoutModel
    from scaleout_mp.task import ExitReport

#: Seconds between two looks at what the job uses.
_TICK: Final = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is to run, and how."""

    target: Target
    settings: Mapping[str, Any]
    limits: Limits
    resources: Resources
    #: Names of the GPUs that it sees; None: all.
    gpus: Sequence[str] | None
    sandbox: Sandbox
    surroundings: Surroundings
    start_method: Literal["template", "spawn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobOutcome:
    """How it ended."""

    report: ExitReport
    value: Any
    #: The signal that had it stopped.
    stopped_by_signal: int | None


class _Stopper:
    """The first Ctrl-C, or SIGTERM, asks the job to stop; the second kills it."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._execution: Execution | None = None
        self.number: int | None = None

    def watch(self, execution: Execution) -> None:
        self._execution = execution
        if self.number is not None:
            execution.abort(AbortOrigin.CLIENT, _name(self.number))

    def on_signal(self, number: int) -> None:
        again, self.number = self.number is not None, self.number or number
        if self._execution is None:
            return
        if again:
            self._view.say("killing it")
            self._execution.kill()
        else:
            self._view.say(f"{_name(number)}: asking it to stop; again kills it")
            self._execution.abort(AbortOrigin.CLIENT, _name(number))


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


async def run_job(job: Job, model: ScaleoutModel | None, view: View) -> JobOutcome:
    """Run it to its end. Raises LauncherError when no task can run here."""
    core = ExecutorCore(
        limits=job.limits,
        resources=job.resources,
        gpus=job.gpus,
        start_method=job.start_method,
        sandbox=job.sandbox,
        surroundings=job.surroundings,
        max_concurrent_tasks=1,
    )
    stopper = _Stopper(view)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopper.on_signal, number)
    try:
        await core.start()
        execution = core.submit(
            job.target,
            model,
            dict(job.settings),
            name=f"{job.target.module.rpartition('/')[2]}:{job.target.function}",
            on_record=view.record,
            on_state=view.state,
        )
        stopper.watch(execution)
        with view.shown(execution):
            ended = asyncio.ensure_future(execution.outcome())
            while not ended.done():
                view.tick()
                await asyncio.wait([ended], timeout=_TICK)
        outcome = ended.result()
    finally:
        await core.aclose()
    return JobOutcome(report=outcome.report, value=outcome.value, stopped_by_signal=stopper.number)
