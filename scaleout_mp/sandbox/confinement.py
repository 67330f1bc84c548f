"""What a task's process puts on before any user code runs in it."""

from __future__ import annotations

import dataclasses
import logging
import os
import resource
import sys
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.sandbox import process, tree

if TYPE_CHECKING:
    from scaleout_mp.sandbox.layers import OwnLayers

#: What may be reserved without being touched: stacks of threads count in full, and allocators take more than they use.
_DATA_SLACK: Final = 1 << 30


#: What programs ask for a place for temporary files.
TEMP_VARIABLES: Final = ("TMPDIR", "TMP", "TEMP")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confinement:
    """Made by the executor, sent to the child, applied there."""

    #: Mark of the task's tree, see `tree`.
    tag: int
    #: Bytes; 0: none.
    memory_limit: int = 0
    #: Bytes of arguments that are mapped privately, which counts as data though it is shared until it is changed.
    handed_over: int = 0
    #: The task's own folder, empty and writable, for its temporary files; empty: it has none.
    scratch: str = ""
    #: Where it starts; empty: where the template stands.
    working_directory: str = ""
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
    #: Added to the niceness that it inherits.
    nice: int = 0
    #: Processors on which it runs; empty: all that it inherits.
    affinity: list[int] = dataclasses.field(default_factory=list)
    #: Variables of its own, beside what it inherits.
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    #: Whether the process serves one task after the other, and not just one.
    resident: bool = False
    #: Seconds between two signs of life that `check_task_abort` sends at most; 0: none are wanted.
    progress_every: float = 0.0
    #: Records of the logging module below this level stay in the child.
    log_level: int = logging.WARNING

    def to_fields(self) -> dict[str, Any]:
        """Return what a frame carries."""
        # All are plain values; `asdict` would copy them for a tenth of a millisecond.
        return dict(vars(self))

    def apply(self, own: OwnLayers) -> None:
        """Put it on. The rest of the level came with the fork, from a template that is prepared.

        Raises OSError when the kernel refuses a part that was found to work before: then no user code may run.
        """
        # The template is closed, and this one was until now.
        process.set_dumpable(True)
        self._apply_limits()
        self._apply_resources()
        self._enter_folders()
        # Last: it forbids what comes before.
        own.put_on(self.scratch)

    def _apply_resources(self) -> None:
        os.environ.update(self.environment)
        if self.affinity:
            os.sched_setaffinity(0, self.affinity)
        if self.nice:
            os.nice(self.nice)

    def _enter_folders(self) -> None:
        if self.scratch:
            for name in TEMP_VARIABLES:
                os.environ[name] = self.scratch
            tempfile = sys.modules.get("tempfile")
            if tempfile is not None:
                # It asks the variables once, which may have been in the template.
                vars(tempfile)["tempdir"] = self.scratch
        if self.working_directory:
            os.chdir(self.working_directory)

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
