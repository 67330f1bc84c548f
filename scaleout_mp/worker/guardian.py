"""The process above the template: it runs no user code, so it can always see to it that nothing is left.

It adopts whoever loses a parent below it. When the supervisor is gone or has closed the channel, and when the template
has died, it kills all that is below it, round by round until nothing is left, and ends the way the template did.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from typing import TYPE_CHECKING, Final, NoReturn

from scaleout_mp.sandbox import process, tree
from scaleout_mp.sandbox.removal import OPEN, remove_ownerless

if TYPE_CHECKING:
    import socket

    from scaleout_mp.sandbox.tree_group import TreeGroup
    from scaleout_mp.worker.lookout import Lookout

#: Seconds between two rounds of killing: the dead have to be gone before their children show.
_ROUND: Final = 0.001
#: Seconds from which on poll(2) is exact enough.
_WHOLE: Final = 0.005
#: Seconds for removing what a dead supervisor's tasks wrote; what is left then goes with the next one's start.
_REMOVAL: Final = 0.5


class Guardian:
    """State of the guardian."""

    def __init__(
        self,
        channel: socket.socket,
        lookout: socket.socket,
        *,
        supervisor: int,
        scratch: str,
        group: TreeGroup | None,
    ) -> None:
        """Watch over what is forked from now on.

        `supervisor` is the pid of the parent, `lookout` a channel of our own to it, `scratch` the folder that holds
        its tasks' scratch folders; `group` is for the template and all below it, in one of the supervisor's.
        """
        self._group = group
        self._line = lookout
        #: Made when the first order comes: without one the guardian stays small.
        self._lookout: Lookout | None = None
        self._scratch = scratch
        self._channel = channel
        self._supervisor = os.pidfd_open(supervisor)
        self._wakeup, self._wakeup_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        if os.getppid() != supervisor:
            # It ended before its descriptor was there.
            os._exit(0)

    def watch(self, template: int) -> NoReturn:
        """Wait for the end of the supervisor or of the template, and clean up."""
        # At level "basic" tasks of an ordinary user could write into this process, which nothing confines. The
        # template, forked before, closes itself once it is prepared.
        process.set_dumpable(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wakeup_end, warn_on_full_buffer=False)
        poll = select.poll()
        # Nothing is read here: the frames are the template's.
        poll.register(self._channel, select.POLLRDHUP)
        # A fork of the supervisor may hold the channel open after its death.
        poll.register(self._supervisor, select.POLLIN)
        poll.register(self._wakeup, select.POLLIN)
        poll.register(self._line, select.POLLIN)
        harmless = {self._wakeup, self._line.fileno()}
        # A task that passes its limit may have taken all processors.
        process.run_before_others()
        status = None
        while status is None:
            ready = self._wait(poll)
            with contextlib.suppress(BlockingIOError):
                os.read(self._wakeup, 4096)
            status = _reap(template)
            if ready - harmless or not self._look_out(template, ordered=self._line.fileno() in ready):
                break
        self._end_everything()
        process.run_as_others_do()
        if (group := self._group_to_end()) is not None:
            # Where it is not empty yet, another guardian is at that, and removes it.
            with contextlib.suppress(OSError):
                group.remove()
        if self._orphaned:
            _clear_away(self._scratch)
        _end_like(status)

    def _wait(self, poll: select.poll) -> set[int]:
        """Return the descriptors on which something has happened; none when a look is due."""
        pause = None if self._lookout is None else self._lookout.pause()
        if pause is None:
            return {descriptor for descriptor, _ in poll.poll()}
        # poll(2) knows whole milliseconds only, in which a process touches several megabytes.
        whole = pause >= _WHOLE
        ready = {descriptor for descriptor, _ in poll.poll(int(pause * 1000) if whole else 0)}
        if not whole and not ready:
            time.sleep(pause)
        return ready

    def _look_out(self, template: int, *, ordered: bool) -> bool:
        """Do what is due; False once the supervisor is gone."""
        if ordered and self._lookout is None:
            from scaleout_mp.worker.lookout import Lookout

            self._lookout = Lookout(self._line)
        if self._lookout is None:
            return True
        return (not ordered or self._lookout.receive()) and self._lookout.look(template)

    @property
    def _orphaned(self) -> bool:
        """Whether the supervisor is gone; its descriptors are closed before that."""
        return bool(select.select([self._supervisor], [], [], 0)[0])

    def _group_to_end(self) -> TreeGroup | None:
        return self._group.around if self._group is not None and self._orphaned else self._group

    def _end_everything(self) -> None:
        deadline = time.monotonic() + tree.TRACKER_GRACE
        # Only children are killed one by one: they keep their pid until they are reaped here. Their own children come
        # up next.
        while children := process.children():
            gentle = time.monotonic() < deadline
            # Of a supervisor that lives, another template may be in the group around.
            if (group := self._group_to_end()) is not None:
                group.kill(_is_no_tracker if gentle else _is_anybody)
            # The youngest first: of those that fork and leave, the others are dead already.
            doomed = [pid for pid in reversed(children) if not (gentle and tree.is_tracker(pid))]
            # Trackers are in the groups of those whose shared memory they remove.
            process.kill_children(doomed, groups=not gentle)
            select.poll().poll(_ROUND * 1000)
            with contextlib.suppress(ChildProcessError):
                # Not until there is nobody, as above.
                for _ in children:
                    if not os.waitpid(-1, os.WNOHANG)[0]:
                        break


def _is_no_tracker(pid: int) -> bool:
    return not tree.is_tracker(pid)


def _is_anybody(_: int) -> bool:
    return True


def _reap(template: int) -> int | None:
    """Reap whoever has died; return the template's status when it is among them."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == template:
                # Those that come now may die as fast as they are reaped.
                return status
    return None


def _clear_away(scratch: str) -> None:
    """Remove a dead supervisor's scratch folders."""
    deadline = time.monotonic() + _REMOVAL
    parent, name = os.path.split(scratch)
    with contextlib.suppress(OSError):
        folder = os.open(parent, OPEN)
        remove_ownerless(name, folder, lambda: time.monotonic() > deadline)


def _end_like(status: int | None) -> NoReturn:
    code = 0 if status is None else os.waitstatus_to_exitcode(status)
    if code < 0:
        # So that the supervisor hears what the template died of.
        with contextlib.suppress(OSError, ValueError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
