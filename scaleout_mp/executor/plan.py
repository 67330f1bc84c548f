"""What the executor knows of a task before it runs, and what comes of it."""

from __future__ import annotations

import dataclasses
import logging
import math
import resource
from typing import TYPE_CHECKING, Any

from scaleout_mp.config.machine import wanted_threads
from scaleout_mp.config.resources import gpu_environment
from scaleout_mp.sandbox.confinement import Confinement

if TYPE_CHECKING:
    from collections.abc import Callable

    from scaleout_mp.config import Limits, Resources
    from scaleout_mp.executor.residents import WorkerSpec
    from scaleout_mp.executor.scheduling import Holding
    from scaleout_mp.executor.scratch import ScratchKeeper
    from scaleout_mp.executor.states import StateSlot
    from scaleout_mp.ipc.arguments import PackedArguments
    from scaleout_mp.ipc.callables import PreparedCallable
    from scaleout_mp.sandbox.cgroup import MemoryGroup, MemoryGroups
    from scaleout_mp.task import ExitReport, Record, TaskState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a task."""

    report: ExitReport
    #: What the callable returned; None unless the task completed.
    value: Any = None
    #: Whether memory that was lent for the arguments can be used again.
    lent_back: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionPlan:
    """What a task runs, and how. Made by `ExecutorCore.submit`."""

    task_id: str
    name: str
    call: PreparedCallable
    arguments: PackedArguments
    limits: Limits
    max_model_size: int
    resources: Resources
    #: Whether GPUs are shared out: a task then sees those that it was given.
    shares_gpus: bool = False
    #: Where groups for tasks with a memory limit are made; None: there is no such place.
    memory_groups: MemoryGroups | None = None
    #: Who makes the task's scratch folder.
    scratch: ScratchKeeper
    #: Where a task with that scratch folder starts, see `Confinement.working_directory`.
    start_folder: Callable[[str], str]
    #: The worker that runs it; None: a process of its own.
    worker: WorkerSpec | None = None
    #: The state that it hands on; None: none.
    state: StateSlot | None = None
    on_record: Callable[[Record], None] | None = None
    on_state: Callable[[TaskState], None] | None = None

    def confinement(self, *, tag: int, group: MemoryGroup | None, scratch: str, holding: Holding | None) -> Confinement:
        """Return what its process puts on; `tag`, `group` and `scratch` were made for it, `holding` given to it."""
        limits, resources = self.limits, self.resources
        cpu_time, no_progress = limits.seconds("cpu_time"), limits.seconds("no_progress")
        gpus = () if holding is None else holding.gpus
        return Confinement(
            tag=tag,
            memory_limit=limits.memory_bytes,
            handed_over=self.arguments.memory_bytes,
            scratch=scratch,
            working_directory=self.start_folder(scratch),
            memory_group="" if group is None else group.procs,
            cpu_limit=0 if cpu_time is None else math.ceil(cpu_time),
            open_files=limits.open_files or _own_open_files(),
            file_size=None if limits.file_size is None else limits.file_size_bytes,
            threads=limits.threads or len(resources.affinity or ()) or wanted_threads(),
            nice=resources.nice,
            affinity=sorted(resources.affinity or ()),
            environment=gpu_environment(gpus) if self.shares_gpus else {},
            progress_every=0.0 if no_progress is None else min(1.0, no_progress / 4),
            log_level=logging.getLogger().getEffectiveLevel(),
        )


def _own_open_files() -> int:
    """Return how many descriptors this process may have, 0 for any number.

    A task may have as many, and not raise that by itself: what a process has under way to others of its user keeps
    those from sending who may have fewer (unix(7)).
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 0 if soft == resource.RLIM_INFINITY else soft
