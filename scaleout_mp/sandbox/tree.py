"""Find and kill every process of a task, however it tried to get away.

A task is marked by a tag that all descendants inherit: the hard limit of RLIMIT_RTTIME, which concerns nobody but
processes under a real-time scheduler and is set to a number that no other task has. `setsid`, double forks and the
death of parents do not change it. The template adopts orphans, so it also knows when nothing is left to look for.

Facts: getrlimit(2) (limits are inherited by fork and kept by exec; prlimit reads them from other processes of the same
user), pidfd_open(2).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import random
import re
import resource
import signal
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from scaleout_mp.sandbox.tree_group import TreeGroup

#: Tags lie in [2^60, 2^61): above any limit that a person would set, below "unlimited".
_TAG_BASE: Final = 1 << 60
#: Least hard limit below which there is still room for tags.
_LEAST_ROOM: Final = 1 << 16
_CLEAN_SCANS: Final = 3
#: Seconds between two searches while processes are dying.
_SHORTEST_PAUSE: Final = 0.001
_LONGEST_PAUSE: Final = 0.004
#: Seconds of killing one after the other before all that could fork meanwhile are held still.
_CHASE: Final = 0.03
#: Of the flags in /proc/PID/stat.
_PF_EXITING: Final = 0x4

#: Seconds that resource trackers have to clean up, counted from the first kill.
TRACKER_GRACE: Final = 0.5
_TRACKER: Final = re.compile(rb"resource_tracker import main; ?main\(")
_LONGEST_COMMAND: Final = 4096

_tags: Final = itertools.count(random.SystemRandom().getrandbits(40) << 19)


def new_tag() -> int:
    """Return a tag that no other task of this machine has, up to chance in 2^40 between supervisors.

    Where the limit is set already, as by a service manager, tags lie below it; then chance is what room there is.
    Raises OSError when there is none.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_RTTIME)
    number = next(_tags)
    if hard == resource.RLIM_INFINITY:
        return _TAG_BASE + number % _TAG_BASE
    if hard < _LEAST_ROOM:
        raise OSError(errno.EPERM, f"RLIMIT_RTTIME is {hard}: no room for the marks of tasks below it")
    return hard - 1 - number % (hard // 2)


def wear_tag(tag: int) -> None:
    """Put the tag on the calling process and, from now on, on every descendant. Raises OSError."""
    try:
        resource.setrlimit(resource.RLIMIT_RTTIME, (tag, tag))
    except ValueError as error:
        # What Python makes of EPERM here.
        text = "RLIMIT_RTTIME cannot be changed, as inside a task of a sandboxed executor"
        raise PermissionError(errno.EPERM, text) from error


def wears(pid: int, tag: int) -> bool:
    """Whether a process wears the tag."""
    # Of another user: a task cannot become another user, so it isn't ours.
    return tag_of(pid) == tag


def tag_of(pid: int) -> int | None:
    """Return the tag of a process, or the limit that it has instead; None when it is gone, or of another user."""
    try:
        return resource.prlimit(pid, resource.RLIMIT_RTTIME)[1]
    except (ProcessLookupError, PermissionError):
        return None


def _state(pid: int) -> bytes:
    """Return the letter of a process's state, as of proc(5); "X" when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except OSError:
        return b"X"
    return stat[stat.rindex(b")") + 2 : stat.rindex(b")") + 3]


def _is_leaving(pid: int) -> bool:
    """Whether a process is dead, or giving back what it had: it forks no more."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except OSError:
        return True
    return bool(int(stat[stat.rindex(b")") + 2 :].split()[6]) & _PF_EXITING)


def _is_zombie(pid: int) -> bool:
    return _state(pid) in b"ZX"


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal; another program than ours in it, after an exec, has none."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            caught = next(line for line in file if line.startswith(b"SigCgt:"))
    except (OSError, StopIteration):
        return False
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, by a signal or a debugger, and will do nothing until it is continued."""
    return _state(pid) in b"Tt"


def stop_tagged(pids: Iterable[int], tag: int) -> list[int]:
    """Have those of the processes that wear the tag stop; return those that were not stopped before."""
    return [pid for pid in pids if _state(pid) not in b"TtZX" and signal_process(pid, tag, signal.SIGSTOP)]


def tagged(tag: int) -> list[int]:
    """Return the pids of all living processes that wear the tag."""
    return [
        pid for name in os.listdir("/proc") if name.isdigit() and wears(pid := int(name), tag) and not _is_zombie(pid)
    ]


class Census:
    """Who wears which tag, looked up for all tasks of a supervisor at once. May be used from several threads."""

    def __init__(self) -> None:
        self._taken = -math.inf
        self._wearers: dict[int, list[int]] = {}

    def wearers(self, tag: int, *, seconds: float) -> list[int]:
        """Return the pids of the living processes that wore the tag at a search which is not older than `seconds`."""
        now = time.monotonic()
        if now - self._taken > seconds:
            # Before the search, so that another thread does not begin one as well.
            self._taken = now
            self._wearers = _search()
        return [pid for pid in self._wearers.get(tag, ()) if wears(pid, tag) and not _is_zombie(pid)]


def _search() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                worn = resource.prlimit(int(name), resource.RLIMIT_RTTIME)[1]
                found.setdefault(worn, []).append(int(name))
    return found


def signal_tagged(tag: int, number: signal.Signals, group: TreeGroup | None = None) -> int:
    """Send a signal to every living process that wears the tag; return how many got it.

    `group`, where there is one, contains all of them, unless somebody has left it.
    """
    return sum(signal_process(pid, tag, number) for pid in _wearers(tag, group))


def _wearers(tag: int, group: TreeGroup | None) -> list[int]:
    if group is None:
        return tagged(tag)
    # Without those who are dead already, however many: a search of all processes takes seconds then. Whoever has died
    # since was alive just now, and may have left a child.
    return [pid for pid in group.members() if wears(pid, tag)]


def signal_process(pid: int, tag: int, number: int) -> bool:
    """Send a signal to one process, if it still wears the tag; return whether it got it."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        # The descriptor is bound to one process. If that still exists after the tag was read by number, the tag
        # was this process's own: a pid is not given out again before its process was reaped.
        if not wears(pid, tag):
            return False
        _send(descriptor, pid, number)
        if number == signal.SIGKILL:
            # A stopped process dies of SIGKILL all the same; its stopped children want to be woken.
            with contextlib.suppress(ProcessLookupError):
                _send(descriptor, pid, signal.SIGCONT)
        return True
    except (ProcessLookupError, PermissionError):
        return False
    finally:
        os.close(descriptor)


def _send(descriptor: int, pid: int, number: int) -> None:
    try:
        signal.pidfd_send_signal(descriptor, number)
    except PermissionError:
        # By the system call filter, where this executor runs inside a task. The number was this process's just now.
        os.kill(pid, number)


def kill_tagged(tag: int, *, group: TreeGroup | None = None, seconds: float = 10.0) -> int:
    """Kill every process that wears the tag until three scans in a row find none; return how many were killed.

    `group`, where there is one, contains all of them, unless somebody has left it. Blocks, normally for a few
    milliseconds, and somewhat longer where a tracker cleans up. Raises TimeoutError after `seconds`, when processes
    hang in the kernel or fork faster than they are killed.
    """
    started = time.monotonic()
    seen: set[int] = set()
    killed: set[int] = set()
    clean = 0
    pause = _SHORTEST_PAUSE
    while clean < _CLEAN_SCANS:
        began = time.monotonic()
        # The last one is always a search of all processes: it finds those who have left the group.
        found = _wearers(tag, None if clean == _CLEAN_SCANS - 1 else group)
        search = time.monotonic() - began
        if not found:
            clean += 1
            continue
        clean = 0
        doomed = found
        gentle = time.monotonic() < started + TRACKER_GRACE
        if gentle:
            doomed = [pid for pid in found if not is_tracker(pid)]
        before = len(killed)
        killed.update(pid for pid in doomed if signal_process(pid, tag, signal.SIGKILL))
        news = not seen.issuperset(found)
        seen.update(found)
        # Not for those who only take their time to go: others would stand still for them.
        if group is not None and news and time.monotonic() > started + _CHASE:
            killed.update(kill_held(tag, group, gentle=gentle))
        if time.monotonic() > started + seconds:
            raise TimeoutError(f"processes {found} are still there {seconds:g} s after SIGKILL")
        # Let the dying leave, which takes the processors some time for what they had in memory; and longer when nobody
        # new has come: searching would take that from them.
        pause = min(_LONGEST_PAUSE, 2 * pause) if len(killed) == before else _SHORTEST_PAUSE
        # And when the search itself takes long: those may be thousands who fork and leave faster than they are found.
        time.sleep(max(pause, search))
    return len(killed)


def kill_held(tag: int, group: TreeGroup, *, gentle: bool) -> list[int]:
    """Hold a whole group still and kill who wears the tag in it; return them. `gentle`: not who may be a tracker.

    Nobody is held still where all who wear it are on their way out.
    """
    if all(_is_leaving(pid) for pid in _wearers(tag, group)):
        return []
    return group.kill(lambda pid: wears(pid, tag) and not (gentle and is_tracker(pid)))


def is_tracker(pid: int) -> bool:
    """Whether a process looks like a resource tracker, of multiprocessing or joblib, or may just become one.

    Once all others of its program are gone, it removes the shared memory and semaphores that they have registered with
    it and left in /dev/shm, and ends: nobody else knows whose those are. Whoever pretends to be one lives on for
    `TRACKER_GRACE`, no longer.
    """
    line = _command(pid)
    return not line or _TRACKER.search(line) is not None


def _command(pid: int) -> bytes:
    """Return a process's command line; empty while it has no memory of its own yet, or any more."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read(_LONGEST_COMMAND)
    except OSError:
        return b""
