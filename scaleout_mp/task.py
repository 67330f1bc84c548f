"""What a task is: its states, how it can end, what it logs, and the report that every end produces.

Pure vocabulary, shared by supervisor and child: no processes, no sockets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from typing import TYPE_CHECKING, Any, Final, Protocol

from scaleout_mp.display import html_table, readable_size
from scaleout_mp.errors import ImportedForTaskError, TaskCrashed, TaskError, TaskFailed, TaskKilled, TaskRefused

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

#: Where each kind of end is explained at length; a fragment names the reason.
WHY_KILLED_PAGE: Final = "docs/why-was-my-task-killed.md"


class TaskState(enum.StrEnum):
    """Where a task is in its life."""

    #: Accepted, waiting for a process.
    PENDING = "pending"
    #: A process was asked for.
    STARTING = "starting"
    #: The process runs.
    RUNNING = "running"
    #: On the ladder: abort frame, SIGTERM, SIGKILL.
    STOPPING = "stopping"
    #: Gone, with all its descendants; the report is final.
    ENDED = "ended"


_NEXT: Final[Mapping[TaskState, frozenset[TaskState]]] = {
    TaskState.PENDING: frozenset({TaskState.STARTING, TaskState.ENDED}),
    TaskState.STARTING: frozenset({TaskState.RUNNING, TaskState.STOPPING, TaskState.ENDED}),
    TaskState.RUNNING: frozenset({TaskState.STOPPING, TaskState.ENDED}),
    TaskState.STOPPING: frozenset({TaskState.ENDED}),
    TaskState.ENDED: frozenset(),
}


class EndReason(enum.StrEnum):
    """Why a task is over."""

    #: A whole, verified result arrived.
    COMPLETED = "completed"
    #: The callback raised, or returned what cannot be sent.
    FAILED = "failed"
    #: The process died of a signal that nobody here sent, or exited without a result.
    CRASHED = "crashed"
    #: The task's tree passed its memory limit.
    MEMORY_LIMIT = "memory_limit"
    #: The task ran longer than its wall-clock limit.
    WALL_TIME = "wall_time"
    #: The task's tree used more processor time than it may.
    CPU_TIME = "cpu_time"
    #: Nothing was logged, and the abort was not looked at, for too long.
    NO_PROGRESS = "no_progress"
    #: The task's tree had more processes and threads than it may.
    PIDS = "pids"
    #: The task wrote, or wanted to write, a file larger than it may.
    FILE_SIZE = "file_size"
    #: The task wrote more into its scratch folder than it may.
    SCRATCH_SIZE = "scratch_size"
    #: The task wanted more descriptors than it may have.
    OPEN_FILES = "open_files"
    #: The server asked for the end (status INTERRUPTED).
    INTERRUPTED_BY_SERVER = "interrupted_by_server"
    #: The server's own clock ran out (status TIMEOUT).
    TIMED_OUT_BY_SERVER = "timed_out_by_server"
    #: The client's own user asked for the end: an abort, Ctrl-C, SIGTERM.
    INTERRUPTED_BY_CLIENT = "interrupted_by_client"
    #: The child broke the rules of the control channel.
    PROTOCOL = "protocol"
    #: No process was ever started.
    REFUSED = "refused"


#: Somebody outside wanted the end.
INTERRUPTIONS: Final = frozenset(
    {EndReason.INTERRUPTED_BY_SERVER, EndReason.TIMED_OUT_BY_SERVER, EndReason.INTERRUPTED_BY_CLIENT}
)


class AbortOrigin(enum.StrEnum):
    """Who asks for a task's end from outside."""

    SERVER = "server"
    SERVER_TIMEOUT = "server_timeout"
    CLIENT = "client"

    @property
    def end_reason(self) -> EndReason:
        """The reason that the report will carry."""
        return {
            AbortOrigin.SERVER: EndReason.INTERRUPTED_BY_SERVER,
            AbortOrigin.SERVER_TIMEOUT: EndReason.TIMED_OUT_BY_SERVER,
            AbortOrigin.CLIENT: EndReason.INTERRUPTED_BY_CLIENT,
        }[self]


class StopStage(enum.StrEnum):
    """The last rung of the ladder that a stop needed."""

    #: The task ended by itself after the abort frame.
    ABORT = "abort"
    SIGTERM = "SIGTERM"
    SIGKILL = "SIGKILL"


class TaskLife:
    """The state of one task; the only moves are those of the state machine."""

    def __init__(self) -> None:
        self.state = TaskState.PENDING

    def advance(self, to: TaskState) -> None:
        """Move on, or raise RuntimeError when the machine has no such edge."""
        if to not in _NEXT[self.state]:
            raise RuntimeError(f"a task cannot go from {self.state} to {to}")
        self.state = to

    @property
    def ended(self) -> bool:
        """Whether the task is over."""
        return self.state is TaskState.ENDED


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitReport:
    """How one task ended. Made exactly once per task."""

    task_id: str
    #: What ran, for people: a qualified name or a task type.
    name: str
    reason: EndReason
    #: One line that says what happened, with figures.
    message: str
    #: Exit code of the process; None when a signal ended it or it never ran.
    exit_code: int | None = None
    #: Name of the signal that ended the process, SIGSEGV for example.
    signal: str | None = None
    #: Class name of what the callback raised.
    error_type: str | None = None
    #: Traceback of what the callback raised, or of the crash when faulthandler wrote one.
    traceback: str | None = None
    #: Bytes; None means no limit.
    memory_limit: int | None = None
    #: Bytes of private memory and swap of the whole tree, the largest value seen by the watchdog.
    peak_memory: int | None = None
    #: Bytes resident in the task's process at its peak, shared pages included (rusage).
    max_rss: int | None = None
    wall_seconds: float = 0.0
    #: User and system time of the process and of the descendants that it waited for.
    cpu_seconds: float | None = None
    #: Step of the last metric that arrived.
    last_step: int | None = None
    #: Python stacks of all threads at the moment the task was found not to stop, or not to get on.
    stacks: str | None = None
    stdout_tail: str = ""
    stderr_tail: str = ""
    #: The rung of the ladder that was needed; None when the task ended on its own.
    stopped_by: StopStage | None = None
    #: How the process was started: "template" or "spawn".
    start_method: str | None = None
    #: What confined it, layer by layer: what this machine takes of the level that was asked for.
    layers: tuple[str, ...] = ()
    #: Name of the worker that ran it, a process that keeps its state between tasks; None: a process of its own.
    worker: str | None = None
    #: What else is worth knowing, such as descendants that had to be killed.
    notes: tuple[str, ...] = ()

    @property
    def completed(self) -> bool:
        """Whether a whole, verified result arrived."""
        return self.reason is EndReason.COMPLETED

    def explain(self) -> str:
        """Say in one line how the task ended and, for a bad end, where to read on."""
        line = f"task {self.name}: {self.message}"
        if self.completed:
            return line
        return f"{line} (see {WHY_KILLED_PAGE}#{self.reason.value.replace('_', '-')})"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-serialisable values."""
        fields = dataclasses.asdict(self)
        fields["notes"], fields["layers"] = list(self.notes), list(self.layers)
        return {key: value.value if isinstance(value, enum.Enum) else value for key, value in fields.items()}

    def _repr_html_(self) -> str:
        """Return what a notebook shows of it."""
        facts = [("how it ended", self.reason.value), ("time", f"{self.wall_seconds:.2f} s")]
        if self.peak_memory is not None:
            limit = "" if self.memory_limit is None else f" of {readable_size(self.memory_limit)}"
            facts.append(("memory", f"at most {readable_size(self.peak_memory)}{limit}"))
        if self.cpu_seconds is not None:
            facts.append(("processor time", f"{self.cpu_seconds:.2f} s"))
        if self.last_step is not None:
            facts.append(("last step", str(self.last_step)))
        if self.exit_code or self.signal:
            facts.append(("process", self.signal or f"exit code {self.exit_code}"))
        facts += [("note", note) for note in self.notes]
        texts = [
            ("traceback", self.traceback),
            ("stacks when it was stopped", self.stacks),
            ("standard output", self.stdout_tail),
            ("standard error", self.stderr_tail),
        ]
        return html_table(f"task {self.name}: {self.message}", facts, [(name, text) for name, text in texts if text])

    def to_error(self) -> TaskError:
        """Return the exception that fits this end; call it only when the task did not complete."""
        return _ERRORS[self.reason](report=self)


_ERRORS: Final[Mapping[EndReason, type[TaskError]]] = {
    EndReason.FAILED: TaskFailed,
    EndReason.PROTOCOL: TaskFailed,
    EndReason.CRASHED: TaskCrashed,
    EndReason.REFUSED: TaskRefused,
    EndReason.MEMORY_LIMIT: TaskKilled,
    EndReason.WALL_TIME: TaskKilled,
    EndReason.CPU_TIME: TaskKilled,
    EndReason.NO_PROGRESS: TaskKilled,
    EndReason.PIDS: TaskKilled,
    EndReason.SCRATCH_SIZE: TaskKilled,
    EndReason.FILE_SIZE: TaskFailed,
    EndReason.OPEN_FILES: TaskFailed,
    EndReason.INTERRUPTED_BY_SERVER: TaskKilled,
    EndReason.TIMED_OUT_BY_SERVER: TaskKilled,
    EndReason.INTERRUPTED_BY_CLIENT: TaskKilled,
}


# --- What a task logs ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordContext:
    """Which model, round and session a record belongs to, where the task named it itself."""

    model_id: str | None = None
    round_id: str | None = None
    session_id: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricRecord:
    """Metrics of one step."""

    metrics: Mapping[str, float]
    step: int | None
    #: Seconds since the epoch at which the task logged it.
    timestamp: float
    #: None: the context of the task that logged it.
    context: RecordContext | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttributesRecord:
    """Attributes of the client, as strings."""

    attributes: Mapping[str, str]
    timestamp: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TelemetryRecord:
    """Measurements of the client's machine."""

    telemetry: Mapping[str, float]
    timestamp: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferenceRecord:
    """One result of an inference."""

    key: str
    #: A JSON object.
    payload: str
    inference_id: str
    model_id: str
    timestamp: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogLine:
    """One record of the standard logging module, from inside a task."""

    logger: str
    level: int
    message: str
    timestamp: float


Record = MetricRecord | AttributesRecord | TelemetryRecord | InferenceRecord | LogLine


class RecordIds(Protocol):
    """What says to which model, round and session a record belongs: RecordContext and LoggingContext both do."""

    @property
    def model_id(self) -> str | None: ...  # noqa: D102
    @property
    def round_id(self) -> str | None: ...  # noqa: D102
    @property
    def session_id(self) -> str | None: ...  # noqa: D102


class TaskContext(Protocol):
    """What a running task can do towards its supervisor. The child side provides it."""

    @property
    def task_id(self) -> str:
        """The id under which the supervisor knows this task."""
        ...

    @property
    def state(self) -> dict[Any, Any]:
        """What tasks that name the same state hand on to each other; see docs/isolation.md."""
        ...

    def log_metric(
        self,
        metrics: Mapping[str, float],
        *,
        step: int | None = None,
        context: RecordIds | None = None,
        check_abort: bool = False,
    ) -> None:
        """Send metrics; returns as soon as they are in the channel. With `check_abort`, then do what that does."""
        ...

    def log_attributes(self, attributes: Mapping[str, str]) -> None:
        """Send attributes."""
        ...

    def log_telemetry(self, telemetry: Mapping[str, float]) -> None:
        """Send telemetry."""
        ...

    def log_inference_result(self, key: str, payload: str, *, inference_id: str, model_id: str) -> None:
        """Send a result of an inference; `payload` is a JSON object."""
        ...

    def check_abort(self) -> None:
        """Raise StoppedException when the task was asked to stop. Outside the task's main thread: do nothing."""
        ...


_current: TaskContext | None = None


def current_task() -> TaskContext | None:
    """Return the task that this process runs, or None in a process that runs none."""
    return _current


def set_current_task(context: TaskContext | None) -> None:
    """Name the task that this process runs. Called by the child side only."""
    global _current  # noqa: PLW0603 - a process runs one task
    _current = context


_loads = 0


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Mark a block in which modules are imported to find a task's callable. Used by the child side only."""
    global _loads  # noqa: PLW0603 - imports are the process's
    _loads += 1
    try:
        yield
    finally:
        _loads -= 1


def require_not_loading(what: str) -> None:
    """Raise ImportedForTaskError where `what` stands at the top level of a module that is imported for a task.

    It would be done again by each process that imports the module, and those that it starts import it as well.
    """
    if _loads:
        raise ImportedForTaskError(
            f"a module that is imported for a task {what} while it is imported, and would do so in each process again: "
            'do it in a function, or below `if __name__ == "__main__":`'
        )
