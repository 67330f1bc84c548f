"""The process that a task is in, and what that process has."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from scaleout_mp.sandbox import tree

if TYPE_CHECKING:
    from scaleout_mp.executor.launcher import Child
    from scaleout_mp.executor.lines import TaskLines
    from scaleout_mp.executor.watchdog import TreeWatch
    from scaleout_mp.executor.watches import Watches
    from scaleout_mp.sandbox.cgroup import MemoryGroup
    from scaleout_mp.sandbox.tree_group import TreeGroup


@dataclasses.dataclass(slots=True)
class TaskProcess:
    """Filled in as the process comes about; a worker's task may be given another one."""

    #: What all of its tree wear.
    tag: int = dataclasses.field(default_factory=tree.new_tag)
    child: Child | None = None
    lines: TaskLines | None = None
    watches: Watches | None = None
    group: MemoryGroup | None = None
    #: Path of the task's own folder; empty before there is one.
    scratch: str = ""

    @property
    def tree(self) -> TreeWatch | None:
        """The watch over its tree; None before it runs."""
        return None if self.watches is None else self.watches.tree

    @property
    def tree_group(self) -> TreeGroup | None:
        """What its child is in; None before it is ordered, and where there is no such group."""
        return None if self.child is None else self.child.tree_group

    def forget(self) -> None:
        """Let go of what refers to the task: no cycle may keep its memory until a collection."""
        self.lines = self.watches = self.child = None
