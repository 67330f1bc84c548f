"""What is to be seen while the demo runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import collections
import datetime as dt
import time
from typing import TYPE_CHECKING, Final, Protocol, Self, TextIO

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from scaleout_mp.demo.ledger import TRAINING, Line, Tone
from scaleout_mp.task import EndReason

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from scaleout_mp.demo.feed import TaskView
    from scaleout_mp.demo.fleet import ClientProcess
    from scaleout_mp.demo.ledger import ClientRecord, Ledger
    from scaleout_mp.demo.verdict import RoundScore

_STYLES: Final = {Tone.PLAIN: "", Tone.GOOD: "green", Tone.BAD: "red"}
#: Ends in few words.
_ENDS: Final = {
    EndReason.FAILED.value: "raised",
    EndReason.MEMORY_LIMIT.value: "memory limit",
    EndReason.TIMED_OUT_BY_SERVER.value: "timed out",
}
_STATE_STYLES: Final = {"stopping": "bold red", "running": "green"}
_LAST_LINES: Final = 8
_MIB: Final = 2**20
#: Columns of a terminal on which the whole table fits.
_WIDE: Final = 116
#: A client may hold a task that is being killed beside the one that it works on.
_TASKS_SHOWN: Final = 2


class View(Protocol):
    """Shows a demo as it goes."""

    def __enter__(self) -> Self:
        """Begin."""
        ...

    def __exit__(self, *_: object) -> None:
        """Leave the terminal as it was found."""
        ...

    def tell(self, line: Line) -> None:
        """Tell what has just happened."""
        ...

    def show(self, ledger: Ledger, clients: Sequence[ClientProcess], scores: Sequence[RoundScore]) -> None:
        """Show the state of things; called several times a second."""
        ...


def make_view(stream: TextIO) -> View:
    """Return the view that fits the stream."""
    console = Console(file=stream, highlight=False)
    can_draw = stream.isatty() and not console.is_dumb_terminal and not console.options.ascii_only
    return LiveView(console) if can_draw else PlainView(stream)


class PlainView:
    """A line with the time of day for each thing that happens."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.flush()

    def tell(self, line: Line) -> None:
        """Write the line."""
        self._stream.write(f"{_now()} {line.text}\n")
        self._stream.flush()

    def show(self, ledger: Ledger, clients: Sequence[ClientProcess], scores: Sequence[RoundScore]) -> None:
        """Do nothing: all that matters has a line."""


class LiveView:
    """A table that is drawn anew, with the last lines under it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False)
        self._lines: collections.deque[tuple[str, Line]] = collections.deque(maxlen=_LAST_LINES)
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def tell(self, line: Line) -> None:
        """Add the line to those under the table."""
        self._lines.append((_now(), line))

    def show(self, ledger: Ledger, clients: Sequence[ClientProcess], scores: Sequence[RoundScore]) -> None:
        """Draw everything."""
        seconds = time.monotonic() - self._started
        self._live.update(
            Group(
                _heading(ledger, len(scores), seconds),
                "",
                _client_table(ledger, clients, wide=self._console.width >= _WIDE),
                "",
                _score_line(scores, ledger.rounds),
                *(_told(when, line) for when, line in self._lines),
            ),
            refresh=True,
        )


def _now() -> str:
    return f"{dt.datetime.now().astimezone():%H:%M:%S}"


def _heading(ledger: Ledger, rounds_done: int, seconds: float) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    where = f"round {ledger.round} of {ledger.rounds}" if ledger.round else "starting"
    bar = ProgressBar(total=ledger.rounds, completed=rounds_done, width=24)
    grid.add_row(Text(f"Federated digits: {where}", style="bold"), bar, ledger.phase, Text(f"{seconds:.0f} s"))
    return grid


def _client_table(ledger: Ledger, clients: Sequence[ClientProcess], *, wide: bool) -> Table:
    table = Table(expand=True, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("client", min_width=8, no_wrap=True)
    table.add_column("task", min_width=10, no_wrap=True)
    table.add_column("state", min_width=11, no_wrap=True)
    if wide:
        table.add_column("step", justify="right", min_width=4, no_wrap=True)
        table.add_column("loss", justify="right", min_width=5, no_wrap=True)
    table.add_column("memory / limit", min_width=24 if wide else 13, no_wrap=True)
    if wide:
        table.add_column("updates", justify="right", no_wrap=True)
        table.add_column("accuracy", justify="right", no_wrap=True)
    table.add_column("fault", min_width=21, no_wrap=True)
    for client in clients:
        tasks = client.tasks[:_TASKS_SHOWN]
        record = ledger.client(client.spec.name)
        state = [Text(task.state, style=_STATE_STYLES.get(task.state, "")) for task in tasks] or [_idle(record)]
        cells = [
            Text(record.name),
            _stack([_task_name(task) for task in tasks]),
            _stack(state),
        ]
        if wide:
            cells.append(_stack([Text("" if task.step is None else str(task.step)) for task in tasks]))
            cells.append(_stack([_loss(task) for task in tasks]))
        cells.append(_stack([_memory(task, bar=wide) for task in tasks]))
        if wide:
            cells += [Text(str(record.updates)), Text("" if record.accuracy is None else f"{record.accuracy:.3f}")]
        table.add_row(*cells, _fault(client, record))
    return table


def _fault(client: ClientProcess, record: ClientRecord) -> Text:
    """Return what became of the client's worst task, or what is planned for it."""
    end = record.last_failure
    if end is not None:
        return Text(f"{_ENDS.get(end.reason, end.reason)}, round {end.round}", style="red")
    planned = ", ".join(f"{fault.kind} in round {fault.round}" for fault in client.spec.faults)
    return Text(f"({planned})" if planned else "", style="dim")


def _stack(cells: Sequence[Text]) -> Text:
    return Text("\n").join(cells)


def _idle(record: ClientRecord) -> Text:
    return Text("waiting" if record.connected else "gone" if record.gone else "connecting", style="dim")


def _task_name(task: TaskView) -> Text:
    return Text("train" if task.type == TRAINING else task.type.removeprefix("Scaleout_").lower())


def _loss(task: TaskView) -> Text:
    loss = task.metrics.get("train_loss")
    return Text("" if loss is None else f"{loss:.3f}")


def _memory(task: TaskView, *, bar: bool) -> Text:
    """Return figures in MiB, behind a bar of ten."""
    if not task.limit:
        return Text(f"{task.memory / _MIB:.0f} MiB")
    part = min(1.0, task.memory / task.limit)
    filled = round(part * 10)
    style = "red" if part > 0.8 else "yellow" if part > 0.5 else "green"
    figures = Text(f"{task.memory / _MIB:3.0f} / {task.limit / _MIB:.0f} MiB", style="" if bar else style)
    if not bar:
        return figures
    return Text("█" * filled, style=style) + Text("░" * (10 - filled), style="dim") + Text(" ") + figures


def _score_line(scores: Sequence[RoundScore], rounds: int) -> Text:
    line = Text("held-out accuracy by round:", style="bold")
    for score in scores:
        line.append(f" {score.accuracy:.3f}", style="bold green" if score is scores[-1] else "")
    line.append(" ·" * (rounds - len(scores)), style="dim")
    return line


def _told(when: str, line: Line) -> Text:
    text = Text(f"{when} ", style="dim") + Text(line.text, style=_STYLES[line.tone])
    # A line that wraps now and not then makes the table jump.
    text.no_wrap, text.overflow = True, "ellipsis"
    return text
