"""What a client's status looks like: lines anywhere, tables on a terminal that rich can draw on."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.display import printable, readable_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import RenderableType
    from rich.text import Text

#: Metrics of one task, and deaths of one client on a screen.
_METRICS: Final = 4
_DEATHS: Final = 5
_SHORT_ID: Final = 8


def lines(seen: Mapping[str, Any]) -> list[str]:
    """Return the lines, safe to print: what tasks and servers named may hold anything."""
    shown = [_heading(seen)]
    shown += [_task(task) for task in seen["tasks"]] or ["no task"]
    if seen["deaths"]:
        shown.append("recent deaths:")
        shown += [f"  {_clock(death['at'])} {death['reason']}: {death['message']}" for death in seen["deaths"]]
    return [printable(line) for line in shown]


def _heading(seen: Mapping[str, Any]) -> str:
    parts = [_link(seen), f"{seen['pending_messages']} messages wait"]
    parts += [f"{seen[f'{what}_messages']} {what}" for what in ("dropped", "refused") if seen[f"{what}_messages"]]
    return f"client {seen['name']} ({seen['client_id']}), pid {seen['pid']}: {', '.join(parts)}"


def _link(seen: Mapping[str, Any]) -> str:
    if not seen["connected"]:
        return "no connection"
    trip = seen["round_trip"]
    return f"connected, link {seen['link']}" + ("" if trip is None else f" (round trip {trip * 1e3:.0f} ms)")


def _task(task: Mapping[str, Any]) -> str:
    what = f"task {task['correlation_id']} {task['type']}: {_phase(task)}, {task['seconds']:.0f} s, {_memory(task)}"
    return "  ".join(filter(None, [what, _progress(task), _metrics(task)]))


def _phase(task: Mapping[str, Any]) -> str:
    # While it is being ended, that is what matters.
    return str(task["process_state"] if task["process_state"] == "stopping" else task["phase"])


def _progress(task: Mapping[str, Any]) -> str:
    if task["moved"] is not None:
        total = task["to_move"]
        of = f" of {readable_size(total)} ({task['moved'] / total:.0%})" if total else ""
        return f"{readable_size(task['moved'])}{of}"
    return "" if task["last_step"] is None else f"step {task['last_step']}"


def _memory(task: Mapping[str, Any]) -> str:
    limit = task["memory_limit"]
    return readable_size(task["memory_now"]) + (f" of {readable_size(limit)}" if limit else "")


def _metrics(task: Mapping[str, Any]) -> str:
    metrics = list(task["last_metrics"].items())
    # What is no number went through JSON as null.
    shown = [f"{name} {'nan' if value is None else f'{value:.4g}'}" for name, value in metrics[:_METRICS]]
    return "  ".join([*shown, *([f"and {len(metrics) - _METRICS} more"] if len(metrics) > _METRICS else [])])


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


# On a terminal


def tables(clients: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Return all clients, one under the other, for rich."""
    from rich.console import Group

    parts: list[RenderableType] = []
    for seen in clients:
        parts += [_title(seen), _task_table(seen["tasks"]), *map(_death, seen["deaths"][-_DEATHS:]), ""]
    return Group(*parts)


def _plain(text: str, style: str = "") -> Text:
    """Return text that rich takes for no markup."""
    from rich.text import Text

    return Text(printable(text), style=style, no_wrap=True, overflow="ellipsis")


def _title(seen: Mapping[str, Any]) -> Text:
    return _plain(_heading(seen), "bold" if seen["connected"] else "bold red")


def _task_table(tasks: Sequence[Mapping[str, Any]]) -> RenderableType:
    from rich import box
    from rich.table import Table

    if not tasks:
        return _plain("  no task", "dim")
    table = Table(expand=True, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("task", "type", "phase", "time", "progress", "memory / limit", "last metrics"):
        table.add_column(name, no_wrap=True, ratio=1 if name == "last metrics" else None)
    for task in tasks:
        phase = _phase(task)
        table.add_row(
            _plain(task["correlation_id"][:_SHORT_ID]),
            _plain(task["type"].removeprefix("Scaleout_")),
            _plain(phase, {"stopping": "bold red", "running": "green"}.get(phase, "")),
            _plain(f"{task['seconds']:.0f} s"),
            _plain(_progress(task)),
            _memory_bar(task),
            _plain(_metrics(task)),
        )
    return table


def _memory_bar(task: Mapping[str, Any]) -> Text:
    if not task["memory_limit"]:
        return _plain(_memory(task))
    part = min(1.0, task["memory_now"] / task["memory_limit"])
    style = "red" if part > 0.8 else "yellow" if part > 0.5 else "green"
    return _plain("█" * round(part * 10), style) + _plain("░" * (10 - round(part * 10)), "dim") + f" {_memory(task)}"


def _death(death: Mapping[str, Any]) -> Text:
    return _plain(f"  {_clock(death['at'])} ", "dim") + _plain(f"{death['reason']}: {death['message']}", "red")


def can_draw() -> bool:
    """Whether rich is there and standard output is a terminal on which it can draw."""
    try:
        from rich.console import Console
    except ImportError:
        return False
    console = Console()
    return console.is_terminal and not console.is_dumb_terminal and os.environ.get("TERM") is not None


def is_screen() -> bool:
    """Whether standard output is a terminal whose screen can be cleared."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in {"dumb", "unknown"}
