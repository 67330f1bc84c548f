"""The list of faults, and the words in which each says how its task has to end.

A fault is one small program, which runs in a task's process. Task processes import this by name, so it imports little.
"""

from __future__ import annotations

import dataclasses
import importlib
import mmap
import os
from typing import TYPE_CHECKING, Any

from scaleout_mp import EndReason, Limits, current_task

if TYPE_CHECKING:
    from collections.abc import Callable

    from fault_stage import Stage

    from scaleout_mp import ExitReport, Task

#: The modules that hold the programs.
MODULES = (
    "fault_crash",
    "fault_hang",
    "fault_tree",
    "fault_reach",
    "fault_channel",
    "fault_flood",
    "fault_memory",
    "fault_files",
    "fault_network",
    "fault_results",
)
#: Of a task that may take its time to go, but not the suite's.
SHORT = Limits(abort_grace=0.3)
ANYTHING = object()
#: The name of the variable that programs which a fault starts have in their environment.
MARK = "SCALEOUT_FAULT"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a fault happens, as its program sees it."""

    supervisor: int
    guardian: int
    template: int
    #: The level of confinement, "basic" for example.
    level: str
    #: Part of the environment, or of the mappings, of every process of this fault.
    mark: str
    #: A folder for this fault's files, which nobody else uses.
    folder: str
    #: Where the supervisor works.
    supervisor_folder: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault."""

    program: Callable[[Place], Any]
    ends: EndReason
    limits: Limits = SHORT
    #: Done in the supervisor while the task runs.
    drive: Callable[[Task, Place], None] | None = None
    #: What the task returns when it completes.
    returns: Any = ANYTHING
    #: Name of the signal that ends the process.
    signal: str | None = None
    #: Name of the class that the report gives for what was raised.
    error: str | None = None
    #: Is part of the report's message, of its traceback, of its stacks, and of one of its notes.
    says: str = ""
    trace: str = ""
    stacks: str = ""
    note: str = ""
    #: Further looks at the report.
    check: Callable[[ExitReport, Place], None] | None = None
    #: Returns why the fault cannot be tried on this stage; None when it can.
    needs: Callable[[Stage], str | None] | None = None
    #: Bytes that the supervisor may take more while the task runs: it maps what large results return.
    peak: int = 48 << 20

    @property
    def name(self) -> str:
        """The name of the test."""
        return self.program.__name__


_faults: dict[str, Fault] = {}
_worn: list[mmap.mmap] = []


def fault(ends: EndReason, **how: Any) -> Callable[[Callable[[Place], Any]], Callable[[Place], Any]]:
    """Register a program as a fault; the keywords are fields of `Fault`."""

    def register(program: Callable[[Place], Any]) -> Callable[[Place], Any]:
        if program.__name__ in _faults:
            raise ValueError(f"two faults are called {program.__name__}")
        _faults[program.__name__] = Fault(program=program, ends=ends, **how)
        return program

    return register


def all_faults() -> list[Fault]:
    """Return every fault, in the order of the modules."""
    for module in MODULES:
        importlib.import_module(module)
    return list(_faults.values())


def perform(place: Place, module: str, name: str) -> Any:
    """Run a fault's program; called in the task's process."""
    wear(place.mark)
    return getattr(importlib.import_module(module), name)(place)


def wear(mark: str) -> None:
    """Mark this process, so that nothing of it can hide: programs that it starts, and forks."""
    os.environ[MARK] = mark
    descriptor = os.memfd_create(mark)
    os.ftruncate(descriptor, mmap.PAGESIZE)
    # Programs show the variable, forks the mapping.
    _worn.append(mmap.mmap(descriptor, mmap.PAGESIZE))
    os.close(descriptor)


def needs_filter(stage: Stage) -> str | None:
    """Skip a fault where no system call filter is in force."""
    return None if stage.filtered else f"level {stage.level!r} has no system call filter here: docs/security.md"


def say_ready() -> None:
    """Tell the supervisor that the fault has come to its point."""
    current_task().log_metric({"ready": 1.0})


def abort_when_ready(task: Task, _: Place) -> None:
    """Abort a task once it has said that it is ready."""
    next(task.records())
    task.abort("enough")
