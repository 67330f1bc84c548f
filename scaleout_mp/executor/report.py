"""Turns what was seen of a task's end into its report. Pure."""

from __future__ import annotations

import dataclasses
import signal
from typing import TYPE_CHECKING, Final

from scaleout_mp.config import Limits
from scaleout_mp.display import readable_size
from scaleout_mp.ipc.messages import Refusal
from scaleout_mp.task import EndReason, ExitReport, StopStage

if TYPE_CHECKING:
    from scaleout_mp.executor.launcher import Exited
    from scaleout_mp.ipc.messages import Failure

_CRASH_BANNER: Final = "Fatal Python error:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopCause:
    """Why somebody here decided to end a task."""

    reason: EndReason
    #: Continues the sentence "task X: ...".
    message: str


@dataclasses.dataclass(kw_only=True)
class Evidence:
    """All that was seen of one task."""

    task_id: str
    name: str
    limits: Limits = dataclasses.field(default_factory=Limits)
    peak_memory: int = 0
    wall_seconds: float = 0.0
    last_step: int | None = None
    start_method: str | None = None
    layers: tuple[str, ...] = ()
    stop: StopCause | None = None
    stopped_by: StopStage | None = None
    #: The task's process has said something: it ran, whatever its launcher can tell.
    heard: bool = False
    has_result: bool = False
    failure: Failure | None = None
    exited: Exited | None = None
    #: Name of the long-lived process that ran it; None: one of its own.
    worker: str | None = None
    #: Whether that process goes on to serve other tasks.
    worker_stays: bool = False
    #: How the first call of a new process of that worker ended, when it did not complete.
    set_up: ExitReport | None = None
    #: Seconds of processor time, where the process did not work for this task alone.
    cpu_seconds: float | None = None
    #: The kernel killed a process of the tree because the tree was at its limit.
    killed_by_kernel: bool = False
    #: What the launcher said when it could not start the process, or lost it.
    launcher_problem: str | None = None
    stacks: str | None = None
    #: They were taken in a way that can crash a process.
    stacks_forced: bool = False
    stdout_tail: str = ""
    stderr_tail: str = ""
    #: Bytes of output that were not kept.
    output_lost: int = 0
    #: Living descendants that were killed after the task's own process had ended.
    strays_killed: int = 0

    @property
    def memory_limit(self) -> int:
        """Bytes; 0: none."""
        return self.limits.memory_bytes


def make_report(seen: Evidence) -> ExitReport:
    """Return the one report of a task's end."""
    if seen.set_up is not None and seen.stop is None:
        return dataclasses.replace(
            seen.set_up,
            task_id=seen.task_id,
            name=seen.name,
            message=f"its worker could not be set up: {seen.set_up.name} {seen.set_up.message}",
            wall_seconds=seen.wall_seconds,
        )
    reason, message = _conclude(seen)
    code = None if seen.exited is None else seen.exited.code
    return ExitReport(
        task_id=seen.task_id,
        name=seen.name,
        reason=reason,
        message=message,
        exit_code=code if code is not None and code >= 0 else None,
        signal=_signal_name(code),
        error_type=None if seen.failure is None else seen.failure.error_type,
        traceback=_traceback(seen),
        memory_limit=seen.memory_limit or None,
        peak_memory=seen.peak_memory or None,
        max_rss=None if seen.exited is None else seen.exited.max_rss,
        wall_seconds=seen.wall_seconds,
        cpu_seconds=_cpu_seconds(seen),
        last_step=seen.last_step,
        stacks=seen.stacks,
        stdout_tail=seen.stdout_tail,
        stderr_tail=seen.stderr_tail,
        stopped_by=seen.stopped_by,
        start_method=seen.start_method,
        layers=seen.layers,
        worker=seen.worker,
        notes=_notes(seen, reason, code),
    )


def _cpu_seconds(seen: Evidence) -> float | None:
    if seen.worker is not None:
        return seen.cpu_seconds
    return None if seen.exited is None else seen.exited.cpu_seconds


def _conclude(seen: Evidence) -> tuple[EndReason, str]:
    if seen.has_result:
        return EndReason.COMPLETED, f"completed in {seen.wall_seconds:.2f} s"
    if seen.stop is not None:
        return seen.stop.reason, f"{seen.stop.message}; {_how_it_went(seen)}"
    return _conclude_unasked(seen)


def _conclude_unasked(seen: Evidence) -> tuple[EndReason, str]:
    """Say why a task is over that nobody here wanted to end."""
    if seen.failure is not None:
        if seen.failure.refused is not None:
            refused = _conclude_refusal(seen, seen.failure.refused)
            if refused is not None:
                return refused
        first_line = seen.failure.message.strip().partition("\n")[0]
        raised = f"raised {seen.failure.error_type}: {first_line}".rstrip(": ")
        if seen.killed_by_kernel:
            # The task was told of the end of a child before anybody here was: that is what it raised.
            return (
                EndReason.MEMORY_LIMIT,
                f"{_over_memory(seen)}; the kernel killed one of its processes, and it {raised}",
            )
        return EndReason.FAILED, raised
    if seen.killed_by_kernel:
        return EndReason.MEMORY_LIMIT, f"{_over_memory(seen)}; killed by the kernel"
    if seen.launcher_problem is not None:
        ran = seen.start_method is not None or seen.heard
        return EndReason.CRASHED if ran else EndReason.REFUSED, seen.launcher_problem
    return _conclude_signal(seen) or (EndReason.CRASHED, _crash_message(seen))


def _over_memory(seen: Evidence) -> str:
    limit, peak = readable_size(seen.memory_limit), readable_size(seen.peak_memory)
    return f"passed its memory limit of {limit} (peak {peak})"


def _conclude_signal(seen: Evidence) -> tuple[EndReason, str] | None:
    """Say which limit the kernel's own signal stands for; None: it is another signal, or there is no such limit."""
    code = None if seen.exited is None else seen.exited.code
    if code == -signal.SIGXCPU and seen.limits.cpu_time is not None:
        return EndReason.CPU_TIME, f"used more than its {seen.limits.seconds('cpu_time'):g} s of processor time"
    if code == -signal.SIGXFSZ and seen.limits.file_size is not None:
        return EndReason.FILE_SIZE, _file_size_message(seen.limits)
    return None


def _file_size_message(limits: Limits) -> str:
    return f"wrote a file up to its limit of {readable_size(limits.file_size_bytes)}"


def _conclude_refusal(seen: Evidence, refused: Refusal) -> tuple[EndReason, str] | None:
    """Say which of its limits a task ran into; None when it has no such limit: then the error is its own."""
    limits = seen.limits
    if refused is Refusal.MEMORY and seen.memory_limit:
        return EndReason.MEMORY_LIMIT, (
            f"ran out of memory: an allocation past its limit of {readable_size(seen.memory_limit)} was refused "
            f"(peak {readable_size(seen.peak_memory)})"
        )
    if refused is Refusal.FILE_SIZE and limits.file_size is not None:
        return EndReason.FILE_SIZE, _file_size_message(limits)
    if refused is Refusal.OPEN_FILES and limits.open_files is not None:
        return EndReason.OPEN_FILES, f"wanted more than the {limits.open_files} descriptors that it may have"
    if refused is Refusal.PIDS and limits.pids is not None:
        return EndReason.PIDS, f"could not start a thread; its limit is {limits.pids} processes and threads"
    return None


def _crash_message(seen: Evidence) -> str:
    code = 0 if seen.exited is None else seen.exited.code
    if code == -signal.SIGKILL:
        return "died of SIGKILL that was not sent from here: by the kernel's out-of-memory killer, or by somebody else"
    if code < 0:
        return f"crashed with {_signal_name(code)}"
    return f"exited with code {code} before it returned a result"


def _how_it_went(seen: Evidence) -> str:
    if seen.worker_stays:
        return "it ended by itself"
    if seen.exited is None:
        return "it was never started" if seen.start_method is None else "its launcher was lost"
    if seen.stacks_forced and seen.exited.code == -signal.SIGSEGV:
        return "it died while its stacks were taken, before SIGTERM"
    if seen.stopped_by is StopStage.SIGKILL:
        return "killed with SIGKILL"
    if seen.stopped_by is StopStage.SIGTERM:
        return "it ended on SIGTERM"
    return "it ended by itself"


def _signal_name(code: int | None) -> str | None:
    if code is None or code >= 0:
        return None
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _traceback(seen: Evidence) -> str | None:
    if seen.failure is not None:
        return seen.failure.traceback
    start = seen.stderr_tail.rfind(_CRASH_BANNER)
    return seen.stderr_tail[start:] if start >= 0 else None


def _notes(seen: Evidence, reason: EndReason, code: int | None) -> tuple[str, ...]:
    notes = []
    if seen.worker is not None and seen.start_method is not None and not seen.worker_stays:
        notes.append(f"worker {seen.worker} went with it, and what it held: the next task gets a fresh one")
    if seen.strays_killed:
        plural = "es" if seen.strays_killed > 1 else ""
        notes.append(f"{seen.strays_killed} process{plural} that it left behind had to be killed")
    if seen.output_lost:
        notes.append(f"{readable_size(seen.output_lost)} of its output are not in this report")
    if reason is EndReason.CRASHED and seen.memory_limit and code in {-signal.SIGSEGV, -signal.SIGABRT}:
        notes.append("native code crashes so as well when its memory limit refuses an allocation and it does not look")
    if reason is EndReason.COMPLETED and seen.killed_by_kernel:
        notes.append("the kernel killed one of its processes at the memory limit")
    if reason is EndReason.COMPLETED and code:
        how = _signal_name(code) or f"exit code {code}"
        notes.append(f"its process ended with {how} after the result was in")
    return tuple(notes)
