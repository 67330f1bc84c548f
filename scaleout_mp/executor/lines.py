"""What connects the supervisor with one task's process: its channel, its output and a place for its stacks."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from typing import TYPE_CHECKING, Final

from scaleout_mp.executor import spy
from scaleout_mp.executor.output import OutputTail
from scaleout_mp.ipc.channel import channel_pair, close_all
from scaleout_mp.ipc.loop_channel import SupervisorChannel
from scaleout_mp.sandbox import tree
from scaleout_mp.sandbox.process import GENTLE_STACK_SIGNAL, STACK_SIGNAL

if TYPE_CHECKING:
    from collections.abc import Callable

    from scaleout_mp.errors import ProtocolViolation
    from scaleout_mp.ipc.frames import Frame

#: Bytes that the stacks of all threads may take.
_STACKS_SIZE: Final = 1 << 16
#: Seconds to wait for them: the handler runs at once unless the signal is blocked.
_STACKS_WAIT: Final = 0.1


class TaskLines:
    """Made before the process; the child's ends are closed here as soon as they were passed on."""

    def __init__(
        self,
        *,
        on_frame: Callable[[Frame], None],
        on_closed: Callable[[ProtocolViolation | None], None],
        echo: Callable[[str, str], None] | None,
        output_size: int,
    ) -> None:
        self._theirs: list[int] = []
        self._tails: list[OutputTail] = []
        ours, theirs = channel_pair()
        self._theirs.append(theirs.detach())
        self.channel = SupervisorChannel(ours, on_frame=on_frame, on_closed=on_closed)
        try:
            for stream in ("stdout", "stderr"):
                self._add_stream(stream, echo, output_size)
            self._stacks = _bounded_memory()
        except OSError:
            self.close()
            raise

    def _add_stream(self, name: str, echo: Callable[[str, str], None] | None, size: int) -> None:
        end, their_end = os.pipe2(os.O_CLOEXEC)
        self._theirs.append(their_end)
        on_text = None if echo is None else (lambda text: echo(name, text))
        self._tails.append(OutputTail(end, on_text, kept=size))

    @property
    def descriptors(self) -> tuple[int, int, int, int]:
        """The child's channel, standard output, standard error and stacks, for the launcher to pass on."""
        channel, stdout, stderr = self._theirs
        return channel, stdout, stderr, self._stacks

    def passed_on(self) -> None:
        """Close our copies of the child's ends: with them open, neither stream would ever end."""
        close_all(self._theirs)
        self._theirs.clear()

    def serve(
        self,
        *,
        on_frame: Callable[[Frame], None],
        on_closed: Callable[[ProtocolViolation | None], None],
        output_size: int,
    ) -> None:
        """Turn to the next task of a process that serves several: what comes from now on is its own."""
        self.channel.serve(on_frame, on_closed)
        for tail in self._tails:
            # What threads or children of an earlier task printed since.
            tail.drain()
            tail.restart(kept=output_size)

    def idle(self, *, on_frame: Callable[[Frame], None], on_closed: Callable[[ProtocolViolation | None], None]) -> None:
        """Turn away from a task that is over; what is printed until the next one is nobody's."""
        self.channel.serve(on_frame, on_closed)

    async def take_stacks(self, pid: int, tag: int, *, gently: bool, seconds: float = _STACKS_WAIT) -> str | None:
        """Return the Python stacks of all threads of a process at this moment; None when it does not answer.

        `gently`: only if the process gets to it between two instructions of Python. Else it is interrupted wherever it
        is, which can crash it, rarely: its frames may be changing. The task could write anything there: the text is
        for people to read, nothing else.
        """
        number = GENTLE_STACK_SIGNAL if gently else STACK_SIGNAL
        if not tree.catches(pid, number):
            # It would die of it.
            return None
        self._clear_stacks()
        if not tree.signal_process(pid, tag, number):
            return None
        # A memfd has no event to wait for.
        deadline = asyncio.get_running_loop().time() + min(seconds, _STACKS_WAIT)
        text = b""
        while asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.002)
            longer = os.pread(self._stacks, _STACKS_SIZE, 0).rstrip(b"\0")
            if longer and longer == text:
                break
            text = longer
        return text.decode("utf-8", "backslashreplace") or None

    async def take_stacks_from_outside(self, pid: int, tag: int, *, seconds: float) -> str | None:
        """Return the Python stacks of a process that does not answer, as py-spy reads them; None: there are none.

        Takes at most so many seconds. The task could have made up what is read there.
        """
        try:
            descriptor = _bounded_memory()
        except OSError:
            return None
        try:
            if not await asyncio.to_thread(spy.read_stacks, pid, tag, descriptor, seconds=seconds):
                return None
            text = os.pread(descriptor, _STACKS_SIZE, 0).rstrip(b"\0")
        except RuntimeError:
            # No thread can be had now. On the loop it would take too long.
            return None
        finally:
            os.close(descriptor)
        return text.decode("utf-8", "backslashreplace") or None

    def _clear_stacks(self) -> None:
        # Of an earlier call; the offset is one for both ends.
        os.pwrite(self._stacks, bytes(_STACKS_SIZE), 0)
        os.lseek(self._stacks, 0, os.SEEK_SET)

    def output(self) -> tuple[str, str]:
        """Return the ends of standard output and standard error, with all that is still in the pipes."""
        for tail in self._tails:
            tail.drain()
        stdout, stderr = self._tails
        return stdout.text, stderr.text

    @property
    def output_lost(self) -> int:
        """Bytes of output that were not kept."""
        return sum(tail.lost for tail in self._tails)

    def close(self) -> None:
        """Close everything."""
        self.passed_on()
        self.channel.close()
        for tail in self._tails:
            tail.close()
        if hasattr(self, "_stacks"):
            with contextlib.suppress(OSError):
                os.close(self._stacks)


def _bounded_memory() -> int:
    """Return a memfd of fixed size: who gets it cannot make it grow."""
    descriptor = os.memfd_create("scaleout-stacks", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, _STACKS_SIZE)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return descriptor
