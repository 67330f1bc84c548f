"""How a running job looks: a live line on a terminal, plain lines elsewhere, JSON lines for machines."""

from __future__ import annotations

import abc
import contextlib
import json
import math
import sys
import time
from typing import TYPE_CHECKING, Any, Final, TextIO

from scaleout_mp.display import printable, readable_size
from scaleout_mp.task import AttributesRecord, MetricRecord, TaskState, TelemetryRecord

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scaleout_mp.cli.job_output import Kept
    from scaleout_mp.executor import Execution
    from scaleout_mp.task import ExitReport, Record

#: Seconds between two plain lines: with news, and without.
_NEWS: Final = 1.0
_NO_NEWS: Final = 30.0
#: Metrics in one line.
_FEW: Final = 4


class View(abc.ABC):
    """Shows one job. Every method is called on the loop that the job runs on."""

    def __init__(self) -> None:
        self._execution: Execution | None = None
        self._started = time.monotonic()
        self._last: MetricRecord | None = None

    @contextlib.contextmanager
    def shown(self, execution: Execution) -> Iterator[None]:
        """Show it while the block lasts."""
        self._execution = execution
        self._started = time.monotonic()
        yield

    def state(self, state: TaskState) -> None:  # noqa: B027 - most show it in every line
        """Take a new state."""

    def record(self, record: Record) -> None:
        """Take what the job logged."""
        if isinstance(record, MetricRecord):
            self._last = record

    @abc.abstractmethod
    def tick(self) -> None:
        """Look at the job; called a few times a second."""

    @abc.abstractmethod
    def say(self, text: str) -> None:
        """Show one line."""

    @abc.abstractmethod
    def end(self, report: ExitReport, kept: Kept | None, *, exit_code: int) -> None:
        """Show how it ended, and its result if it completed."""

    @property
    def at_work(self) -> bool:
        """Whether there is a process to look at."""
        return self._execution is not None and self._execution.state in {TaskState.RUNNING, TaskState.STOPPING}

    def line(self) -> str:
        """Return all that is to be seen now in one line."""
        execution = self._execution
        assert execution is not None
        limit = execution.memory_limit
        of = "" if limit is None else f" of {readable_size(limit)} ({execution.memory_now / limit:.0%})"
        memory = f"memory {readable_size(execution.memory_now)}{of}"
        parts = [execution.state.value, f"{time.monotonic() - self._started:.0f} s", memory, self.metrics()]
        return "  ".join(filter(None, parts))

    def metrics(self) -> str:
        """Return the last metrics; empty: there are none."""
        if self._last is None:
            return ""
        parts = [] if self._last.step is None else [f"step {self._last.step}"]
        metrics = list(self._last.metrics.items())
        parts += [f"{printable(name)} {value:.5g}" for name, value in metrics[:_FEW]]
        if len(metrics) > _FEW:
            parts.append(f"and {len(metrics) - _FEW} more")
        return "  ".join(parts)


class PlainView(View):
    """Lines for a log."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._next = 0.0
        self._shown: object = None

    def tick(self) -> None:
        """Write a line when there is news, and now and then when there is none."""
        if not self.at_work:
            return
        now = time.monotonic()
        news = self._last is not self._shown
        if now >= self._next or (news and now >= self._next - _NO_NEWS + _NEWS):
            self._next = now + _NO_NEWS
            self._shown = self._last
            self.say(self.line())

    def say(self, text: str) -> None:
        """Write one line."""
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def end(self, report: ExitReport, kept: Kept | None, *, exit_code: int) -> None:  # noqa: ARG002
        """Write how it ended to the stream, and the result to stdout."""
        if self._last is not self._shown:
            self.say(f"last metrics: {self.metrics()}")
        show_end(report, kept, self._stream)


def terminal_view() -> View:
    """Return what shows a job on stderr: a live line where that is a terminal and rich is there to draw it."""
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            return LiveView()
    return PlainView(sys.stderr)


class LiveView(View):
    """A line on stderr that changes; what the job prints goes above it. Raises ImportError without rich."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        self._console = Console(stderr=True)
        self._text = Text
        self._live = Live(console=self._console, transient=True, auto_refresh=False)

    @contextlib.contextmanager
    def shown(self, execution: Execution) -> Iterator[None]:
        """Show it while the block lasts."""
        with super().shown(execution), self._live:
            yield

    def tick(self) -> None:
        """Draw the line anew."""
        if self.at_work:
            self._live.update(self._text(self.line(), no_wrap=True, overflow="ellipsis"), refresh=True)

    def say(self, text: str) -> None:
        """Write a line above the live one."""
        self._console.print(self._text(text))

    def end(self, report: ExitReport, kept: Kept | None, *, exit_code: int) -> None:  # noqa: ARG002
        """Write how it ended, and the result to stdout."""
        if self._last is not None:
            self.say(f"last metrics: {self.metrics()}")
        show_end(report, kept, sys.stderr)


def show_end(report: ExitReport, kept: Kept | None, stream: TextIO) -> None:
    """Write how a job ended for people: one line, and what explains a bad end below it."""
    if report.completed:
        peak = "" if report.peak_memory is None else f", at most {readable_size(report.peak_memory)} of memory"
        stream.write(f"{report.message}{peak}\n")
    else:
        stream.write(f"{report.explain()}\n")
        for text in (report.traceback, report.stacks):
            # What it wrote to its standard error was shown as it came.
            if text and text not in report.stderr_tail:
                stream.write(text if text.endswith("\n") else f"{text}\n")
    stream.writelines(f"note: {note}\n" for note in report.notes)
    if kept is not None:
        if kept.path is not None:
            stream.write(f"the result is in {kept.path}\n")
        if kept.problem is not None:
            stream.write(f"error: the result is not kept: {kept.problem}\n")
    stream.flush()
    if kept is not None and kept.shown is not None:
        sys.stdout.write(f"{json.dumps(kept.shown, ensure_ascii=False)}\n")
        sys.stdout.flush()


class JsonView(View):
    """One JSON object in each line, `event` first."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._next = 0.0
        #: Why nothing more can be written: whoever read it is gone, say.
        self._problem: OSError | None = None

    def _write(self, event: str, **fields: Any) -> None:
        if self._problem is not None:
            return
        try:
            self._stream.write(json.dumps({"event": event, **fields}, allow_nan=False) + "\n")
            self._stream.flush()
        except OSError as error:
            # Raised in `tick`, which ends the job: the job's own events must not fail one by one.
            self._problem = error

    def state(self, state: TaskState) -> None:
        """Write a new state."""
        self._write("state", state=state.value, timestamp=time.time())

    def record(self, record: Record) -> None:
        """Write what the job logged."""
        if isinstance(record, MetricRecord):
            self._write("metric", metrics=_finite(record.metrics), step=record.step, timestamp=record.timestamp)
        elif isinstance(record, AttributesRecord):
            self._write("attributes", attributes=dict(record.attributes), timestamp=record.timestamp)
        elif isinstance(record, TelemetryRecord):
            self._write("telemetry", telemetry=_finite(record.telemetry), timestamp=record.timestamp)

    def tick(self) -> None:
        """Write what it uses, once a second. Raises OSError when nothing can be written any more."""
        if self._problem is not None:
            raise self._problem
        execution = self._execution
        now = time.monotonic()
        if execution is not None and self.at_work and now >= self._next:
            self._next = now + _NEWS
            self._write(
                "memory",
                now=execution.memory_now,
                peak=execution.memory_peak,
                limit=execution.memory_limit,
                timestamp=time.time(),
            )

    def say(self, text: str) -> None:
        """Write a remark."""
        self._write("note", text=text, timestamp=time.time())

    def end(self, report: ExitReport, kept: Kept | None, *, exit_code: int) -> None:
        """Write how it ended, and the result."""
        self._write(
            "end",
            exit_code=exit_code,
            report=report.to_dict(),
            result=None if kept is None else kept.shown,
            output=None if kept is None else kept.path,
            problem=None if kept is None else kept.problem,
        )
        if self._problem is not None:
            raise self._problem


def _finite(values: Any) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
