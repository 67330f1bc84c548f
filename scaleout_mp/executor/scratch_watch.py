"""Decides when a task has written more into its scratch folder than it may."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import TYPE_CHECKING, Final

from scaleout_mp.display import readable_size
from scaleout_mp.executor.report import StopCause
from scaleout_mp.sandbox import disk
from scaleout_mp.task import EndReason

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

#: The fastest that files are assumed to grow, bytes per second: into the page cache.
_FASTEST_GROWTH: Final = 4e9
_SHORTEST: Final = 0.005
_LONGEST: Final = 0.25
#: Looking may take this part of the time.
_DUTY: Final = 0.2
#: Entries that are looked at between two events of the loop.
_FEW: Final = 200


@dataclasses.dataclass(kw_only=True)
class ScratchWatch:
    """Follows what one task's scratch folder takes. Sizes in bytes."""

    folder: str
    limit: int
    #: Returns the processes of the task's tree.
    pids: Callable[[], list[int]]
    now: int = 0
    _entries: int = 0
    _cost: float = 0.0
    #: What could not be measured at the last look; what is being made may be closed for a moment.
    _unmeasured: str = ""

    @property
    def large(self) -> bool:
        """Whether a look takes so long that it does not belong on an event loop."""
        return self._entries > _FEW

    def look(self) -> StopCause | None:
        """Measure the folder and say whether it is over its limit."""
        started = time.monotonic()
        try:
            use = disk.measure(self.folder, self.pids(), most=self.limit)
        except OSError as error:
            # For want of descriptors here, which is not the task's doing; the next look may have them.
            logger.warning("a scratch folder cannot be measured: %s", error, extra={"action": "scratch_unmeasured"})
            return None
        self.now, self._entries = use.size, use.entries
        unmeasured, self._unmeasured = self._unmeasured, use.unmeasured
        self._cost = time.monotonic() - started
        if use.size > self.limit:
            text = f"has {readable_size(use.size)} or more in its scratch folder, its limit is "
            return StopCause(reason=EndReason.SCRATCH_SIZE, message=text + readable_size(self.limit))
        if unmeasured and use.unmeasured:
            text = f"keeps its scratch folder, which has a limit, from being measured: {use.unmeasured}"
            return StopCause(reason=EndReason.SCRATCH_SIZE, message=text)
        return None

    def pause(self) -> float:
        """Return the seconds until the next look is due."""
        headroom = (self.limit - self.now) / _FASTEST_GROWTH
        return min(_LONGEST, max(_SHORTEST, headroom, self._cost * (1 / _DUTY - 1)))
