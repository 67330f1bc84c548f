"""The supervisor's line to the lookout, which watches the memory of trees that are near their limit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scaleout_mp.errors import ProtocolViolation
from scaleout_mp.ipc import frames
from scaleout_mp.ipc.channel import close_all
from scaleout_mp.ipc.frames import Frame, Kind
from scaleout_mp.ipc.loop_channel import SupervisorChannel

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from scaleout_mp.executor.watchdog import TreeWatch


class LookoutLine:
    """Hands trees over, and notes what the lookout says about them. On the executor's event loop."""

    def __init__(self, sock: socket.socket) -> None:
        self._watched: dict[int, tuple[TreeWatch, Callable[[], None]]] = {}
        self._prepared = False
        self._channel = SupervisorChannel(sock, on_frame=self._on_frame, on_closed=self._on_closed)

    @property
    def open(self) -> bool:
        """Whether somebody is at the other end."""
        return self._channel.open

    def prepare(self) -> None:
        """Have it load what it needs, which takes some 20 ms the first time."""
        if not self._prepared:
            self._prepared = True
            self._channel.send(frames.encode(Kind.FORGET, 0))

    def watch(self, watched: TreeWatch, on_breach: Callable[[], None]) -> None:
        """Have somebody else count the memory of a tree; `on_breach` is called, once, when it was over its limit.

        It is killed then already.
        """
        watched.handed_over = True
        self._watched[watched.tag] = watched, on_breach
        seen = watched.memory
        self._channel.send(frames.encode(Kind.WATCH, watched.pid, watched.tag, seen.limit, seen.shared))

    def forget(self, watched: TreeWatch) -> None:
        """Have a tree watched no more; it is gone, or has another watch."""
        if watched.handed_over:
            watched.handed_over = False
            self._watched.pop(watched.tag, None)
            self._channel.send(frames.encode(Kind.FORGET, watched.tag))

    def catch_up(self) -> None:
        """Hear what the lookout has said until now: that a tree was over its limit comes before its death."""
        self._channel.drain()

    def close(self) -> None:
        """Close the line."""
        self._channel.close()

    def _on_frame(self, frame: Frame) -> None:
        close_all(frame.descriptors)
        try:
            self._note(frame)
        except (TypeError, ValueError) as error:
            raise ProtocolViolation(f"the lookout sent a {frame.kind.name} that does not fit: {error}") from error

    def _note(self, frame: Frame) -> None:
        if frame.kind is Kind.USE:
            tag, now, peak = frame.fields
        elif frame.kind is Kind.BREACH:
            tag, now = frame.fields
            peak = now
        else:
            raise ProtocolViolation(f"the lookout sent {frame.kind.name}")
        watched, on_breach = self._watched.get(tag, (None, None))
        if watched is None or on_breach is None:
            # It was forgotten while this was under way.
            return
        watched.memory.now = now
        watched.memory.peak = max(watched.memory.peak, peak)
        if frame.kind is Kind.BREACH:
            on_breach()

    def _on_closed(self, _: ProtocolViolation | None) -> None:
        # With the guardian the template and all tasks go; until then the supervisor looks itself.
        for watched, _on_breach in self._watched.values():
            watched.handed_over = False
        self._watched.clear()
