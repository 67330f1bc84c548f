"""What is left of tasks whose first process is gone: children of the template, which adopts them.

Whoever is left of such a task is one of them or below one, so the template alone can tell when nobody is, even of those
that fork and leave again and again: a search of /proc may never see one of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from typing import TYPE_CHECKING, Final

from scaleout_mp.sandbox import process, tree

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

#: Seconds in which the orphans of a task are the supervisor's to kill and to count.
_SUPERVISORS_TIME: Final = 0.25
#: Seconds between two looks while there is always something else to do.
_LOOK_EVERY: Final = 0.05
#: Looks may take a fifth of the time.
_REST: Final = 5
#: Orphans that are looked at while they die faster than they are reaped.
_YOUNGEST: Final = 64
#: Niceness.
_LAST: Final = 19


@dataclasses.dataclass(kw_only=True)
class _Leaving:
    """A task whose first process is gone, and perhaps not the rest."""

    task_id: str
    #: Monotonic clock: from then on its orphans are not left to the supervisor alone.
    impatient_at: float
    #: The same clock: from then on its trackers go as well, with the process groups that they are in.
    gentle_until: float
    #: How many were killed here, at most: some may have been dead.
    killed: int = 0


class Orphans:
    """Kills them, and tells of which tasks nobody is left."""

    def __init__(self, on_cleared: Callable[[str, int], None]) -> None:
        """`on_cleared` gets the id of a task of which nobody is left, and how many were killed here."""
        self._on_cleared = on_cleared
        self._leaving: dict[int, _Leaving] = {}
        #: Monotonic clock; infinite: nobody has died since the last look.
        self._look_at = math.inf
        #: Processes die faster than they are reaped.
        self._behind = False
        #: Monotonic clock: not before that is anybody held back again.
        self._hold_at = 0.0
        self._own_limit = tree.tag_of(os.getpid())

    @property
    def expected(self) -> bool:
        """Whether there may be something to find."""
        return self._look_at < math.inf

    @property
    def due(self) -> bool:
        """Whether a look is due, whatever else there is to do."""
        return time.monotonic() > self._look_at

    @property
    def pause(self) -> float | None:
        """Milliseconds until a look is due even if nothing happens; None: none is."""
        return _LOOK_EVERY * 1000 if self._leaving else None

    def note_death(self) -> None:
        """Note that a child was reaped."""
        self._look_at = min(self._look_at, time.monotonic() + _LOOK_EVERY)

    def leave(self, task_id: str, tag: int) -> None:
        """Follow what is left of a task whose first process is gone, until nobody is."""
        now = time.monotonic()
        self._leaving[tag] = _Leaving(
            task_id=task_id, impatient_at=now + _SUPERVISORS_TIME, gentle_until=now + tree.TRACKER_GRACE
        )

    def caught_up(self) -> None:
        """Note that all who were dead have been reaped."""
        self._behind = False

    @property
    def behind(self) -> bool:
        """Whether processes die faster than they are reaped: to list the dead takes long then."""
        return self._behind

    def hold_back(self, running: Collection[int]) -> None:
        """Stop whoever dies faster than they are reaped, by the process group of one that is dead.

        Those of a task that is gone or being killed are killed; those of one that runs, whose tag is among `running`,
        have the processors when nobody else wants them. Called by the one who reaps, who does nothing else for them.
        """
        self._behind = True
        began = time.monotonic()
        if began < self._hold_at:
            return
        with contextlib.suppress(ChildProcessError, ProcessLookupError, PermissionError):
            dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if dead is None:
                return
            pid, tag = dead.si_pid, tree.tag_of(dead.si_pid)
            if tag not in self._known(running):
                self._kill({pid: tag}, groups=True)
            elif (group := os.getpgid(pid)) not in {0, os.getpgrp()}:
                os.setpriority(os.PRIO_PGRP, group, _LAST)
        # It takes the kernel time for every zombie of the group, which is time for reaping them.
        now = time.monotonic()
        self._hold_at = now + _REST * (now - began)

    def look(self, adopted: Callable[[], list[int]], running: Collection[int]) -> None:
        """Kill what nobody else knows of or finds, and say of which tasks nobody is left.

        `adopted` returns the children that are no task's first process, the oldest first; `running` are the tags of
        tasks. Nobody else knows the tags of an executor that ran inside a task which is gone. Called when there is
        nothing else to do, and seldom otherwise: with each of a thousand that die, it would be a million looks.
        """
        began = time.monotonic()
        pids = adopted()
        patient = {tag for tag, leaving in self._leaving.items() if leaving.impatient_at > began}
        gentle = {tag for tag, leaving in self._leaving.items() if leaving.gentle_until > began and not self._behind}
        spared = self._known(running) | (set() if self._behind else patient)
        # The youngest first: of those that fork and leave, the others are dead already.
        some = pids[: -_YOUNGEST - 1 : -1] if self._behind else pids[::-1]
        orphans = {pid: tree.tag_of(pid) for pid in some}
        strays = {
            pid: tag
            for pid, tag in orphans.items()
            if tag not in spared and not (tag in gentle and tree.is_tracker(pid))
        }
        self._kill({pid: tag for pid, tag in strays.items() if tag in gentle}, groups=False)
        self._kill({pid: tag for pid, tag in strays.items() if tag not in gentle}, groups=True)
        if not self._behind:
            for tag in self._leaving.keys() - orphans.values():
                left = self._leaving.pop(tag)
                self._on_cleared(left.task_id, left.killed)
        now = time.monotonic()
        rest = _REST * (now - began)
        self._look_at = now + (rest if strays else max(rest, _LOOK_EVERY)) if self._leaving else math.inf

    def _known(self, running: Collection[int]) -> set[int | None]:
        # Whoever wears no tag is none of a task's.
        return {None, self._own_limit, *running}

    def _kill(self, strays: dict[int, int | None], *, groups: bool) -> None:
        process.kill_children(strays, groups=groups)
        for tag in strays.values():
            leaving = None if tag is None else self._leaving.get(tag)
            if leaving is not None:
                leaving.killed += 1
