"""What a client's status looks like on a terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def lines(seen: Mapping[str, Any]) -> list[str]:
    """Return the lines, safe to print: what tasks and servers named may hold anything."""
    link = _link(seen)
    who = f"client {seen['name']} ({seen['client_id']}), pid {seen['pid']}"
    shown = [f"{who}: {link}, {seen['pending_messages']} messages wait"]
    shown += [_task(task) for task in seen["tasks"]] or ["no task"]
    deaths = seen["deaths"]
    if deaths:
        shown.append("recent deaths:")
        shown += [f"  {time.strftime('%H:%M:%S', time.localtime(death['at']))} {death['message']}" for death in deaths]
    return [_plain(line) for line in shown]


def _link(seen: Mapping[str, Any]) -> str:
    if not seen["connected"]:
        return "no connection"
    trip = seen["round_trip"]
    return f"connected, link {seen['link']}" + ("" if trip is None else f" (round trip {trip * 1e3:.0f} ms)")


def _task(task: Mapping[str, Any]) -> str:
    limit = task["memory_limit"]
    memory = _size(task["memory_now"]) + (f" of {_size(limit)}" if limit else "")
    metrics = ", ".join(f"{key} {value:.4g}" for key, value in list(task["last_metrics"].items())[:4])
    step = "" if task["last_step"] is None else f" step {task['last_step']}"
    phase = task["phase"] + _moved(task)
    return f"task {task['correlation_id']} {task['type']}: {phase}, {memory}{step} {metrics}".rstrip()


def _moved(task: Mapping[str, Any]) -> str:
    if task["moved"] is None:
        return ""
    total = task["to_move"]
    return f" {_size(task['moved'])}" + (f" of {_size(total)} ({task['moved'] / total:.0%})" if total else "")


def _size(count: float) -> str:
    for unit in _UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {_UNITS[-1]}"


def _plain(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)
