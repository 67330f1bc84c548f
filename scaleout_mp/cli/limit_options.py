"""Options for limits, of every command that runs tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: Limits that are options: name, and what the help says.
LIMITS: Final[Mapping[str, str]] = {
    "memory": 'Private memory of all its processes: "2GiB", or "0.5" of the machine.',
    "wall_time": 'From start to end: "90s", "10m", "1h".',
    "cpu_time": "Processor time of all its processes.",
    "no_progress": "Time without a metric or a look at check_task_abort().",
    "pids": "Processes and threads.",
    "open_files": "Descriptors of each process.",
    "file_size": "Each file that it writes.",
    "scratch_size": "All files in its scratch folder.",
    "threads": "Threads of numerical libraries.",
    "abort_grace": "Time to clean up once asked to stop.  [default: 5s]",
}
COUNTS: Final = frozenset({"pids", "open_files", "threads"})


def limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for each limit; it is None where it is not given."""
    for name, text in reversed(list(LIMITS.items())):
        command = click.option(f"--{name.replace('_', '-')}", type=kind(name), help=text)(command)
    return command


def kind(name: str) -> type:
    """Return the type of a limit's value on the command line."""
    return int if name in COUNTS else str
