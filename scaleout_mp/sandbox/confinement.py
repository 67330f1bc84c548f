"""What a task's process puts on before any user code runs in it."""

from __future__ import annotations

import dataclasses
import enum
import logging
import resource
from typing import Any, Final, Self

from scaleout_mp.sandbox import process, seccomp, tree

#: What may be reserved without being touched: stacks of threads count in full, and allocators take more than they use.
_DATA_SLACK: Final = 1 << 30


class Level(enum.StrEnum):
    """How much a task is confined, apart from its limits."""

    #: Limits only.
    NONE = "none"
    #: No new privileges, and a filter for system calls that reach other processes or the machine.
    BASIC = "basic"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confinement:
    """Made by the executor, sent to the child, applied there."""

    #: Mark of the task's tree, see `tree`.
    tag: int
    level: Level = Level.NONE
    #: Bytes; 0: none.
    memory_limit: int = 0
    #: Bytes of arguments that are mapped privately, which counts as data though it is shared until it is changed.
    handed_over: int = 0
    #: The file by which a process joins the task's memory cgroup; empty: there is none.
    memory_group: str = ""
    #: Seconds of processor time of each process, rounded up; 0: none. The watchdog sums up the tree.
    cpu_limit: int = 0
    #: Descriptors of each process; 0: none.
    open_files: int = 0
    #: Bytes of each file; None: none.
    file_size: int | None = None
    #: Threads of BLAS and OpenMP pools.
    threads: int = 1
    #: Seconds between two signs of life that `check_task_abort` sends at most; 0: none are wanted.
    progress_every: float = 0.0
    #: Records of the logging module below this level stay in the child.
    log_level: int = logging.WARNING

    def to_fields(self) -> dict[str, Any]:
        """Return what a frame carries."""
        return {**dataclasses.asdict(self), "level": self.level.value}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """Return what `to_fields` gave."""
        return cls(**{**fields, "level": Level(fields["level"])})

    def apply(self, call_filter: bytes | None) -> None:
        """Put it on; `call_filter` is what `seccomp.build` returned, None where there is none.

        Raises OSError when the kernel refuses a part that was found to work before: then no user code may run.
        """
        self._apply_limits()
        if self.level is not Level.NONE:
            process.forbid_new_privileges()
            # Last: it forbids what comes before.
            if call_filter is not None:
                seccomp.install(call_filter)

    def _apply_limits(self) -> None:
        tree.wear_tag(self.tag)
        process.forbid_core_files()
        process.prefer_for_oom_kill()
        if self.memory_group:
            process.write_file(self.memory_group, b"0")
        if self.cpu_limit:
            # SIGXCPU a second after the watchdog should have noticed.
            process.limit_own(resource.RLIMIT_CPU, self.cpu_limit + 1)
        if self.open_files:
            process.limit_own(resource.RLIMIT_NOFILE, self.open_files)
        if self.file_size is not None:
            process.limit_own(resource.RLIMIT_FSIZE, self.file_size)
        if self.memory_limit:
            process.limit_data(self.memory_limit, _DATA_SLACK + self.handed_over)
