"""What all events have in common."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping


def figures(values: Mapping[str, Any]) -> str:
    """Return values as a short list for people."""
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened, with the time on both clocks."""

    #: Whether events of this kind are left out of `EventLog.lines()`.
    quiet: ClassVar[bool] = False

    #: time.monotonic(), for gaps and durations.
    monotonic: float = dataclasses.field(default_factory=time.monotonic, repr=False, compare=False)
    #: Seconds since the epoch.
    wall: float = dataclasses.field(default_factory=time.time, repr=False, compare=False)

    @property
    def printed(self) -> bool:
        """Whether the event is worth a line."""
        return not self.quiet


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientEvent(Event):
    """Something that one client did or sent."""

    client_id: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskEvent(ClientEvent):
    """Something about one task."""

    correlation_id: str
    #: Scaleout_ModelUpdate for example; empty when the network does not know the task.
    task_type: str

    @property
    def label(self) -> str:
        """Type and a short id, for people."""
        return f"{self.task_type.removeprefix('Scaleout_') or 'task'} {self.correlation_id[:8]}"
