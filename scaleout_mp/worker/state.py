"""`client.state`, in the child: a dict that outlives the process in which it is changed."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

from scaleout_mp.errors import ScaleoutError, ValueNotSendable
from scaleout_mp.ipc import frames, segments
from scaleout_mp.ipc.callables import pickles
from scaleout_mp.ipc.channel import close_all
from scaleout_mp.ipc.frames import Kind
from scaleout_mp.ipc.messages import StateChange

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Send = Callable[[bytes, Sequence[int]], None]


class KeptState:
    """Unpickled when it is first asked for, and pickled at the task's end if it was."""

    def __init__(self, name: str, most: int, packed: list[Any] | None, descriptors: list[int], send: Send) -> None:
        """Take over the descriptors. `most` is in bytes; `packed` is None while the state is empty."""
        self._name = name
        self._most = most
        self._packed = packed
        self._descriptors = descriptors
        self._send = send
        self._values: dict[Any, Any] | None = None

    def values(self) -> dict[Any, Any]:
        """Return the dict. Raises ScaleoutError when what is there cannot be unpickled."""
        if self._values is None:
            self._values = self._load()
            # What is written from here on is lost if the task does not complete: the supervisor can tell.
            self._send(frames.encode(Kind.STATE, StateChange.OPENED, None), ())
        return self._values

    def _load(self) -> dict[Any, Any]:
        if self._packed is None:
            return {}
        has_memory, table = self._packed
        # Who dies of it cannot say so.
        self._send(frames.encode(Kind.STATE, StateChange.OPENING, None), ())
        (view,) = segments.load(table, self._descriptors.pop() if has_memory else None)
        try:
            values: dict[Any, Any] = pickle.loads(view)
        except Exception as error:
            self._send(frames.encode(Kind.STATE, StateChange.UNREADABLE, None), ())
            raise ScaleoutError(
                f"state {self._name} cannot be read ({type(error).__name__}: {error}); "
                "it is dropped, and the next task finds it empty"
            ) from error
        return values

    def keep(self) -> None:
        """Send the dict if anybody has asked for it. Raises ValueNotSendable that names the key at fault."""
        if self._values is None:
            return
        pickled = self._pickle(self._values)
        if len(pickled) > self._most:
            raise ValueNotSendable(
                f"state {self._name} has {len(pickled)} bytes; at most {self._most} are kept (state_bytes)"
            )
        table, memory = segments.store([pickled])
        descriptors = [] if memory is None else [memory.fileno()]
        try:
            self._send(frames.encode(Kind.STATE, StateChange.KEPT, table, descriptors=len(descriptors)), descriptors)
        finally:
            if memory is not None:
                memory.close()

    def _pickle(self, values: dict[Any, Any]) -> bytes:
        try:
            return pickle.dumps(values, protocol=5)
        except Exception as error:
            culprit = next((key for key, value in values.items() if not pickles(value, plainly=True)), None)
            where = "" if culprit is None else f"[{culprit!r}], a {type(values[culprit]).__qualname__},"
            raise ValueNotSendable(
                f"state {self._name}{where} cannot be kept: {type(error).__name__}: {error}"
            ) from error

    def close(self) -> None:
        """Free what nobody asked for."""
        close_all(self._descriptors)
        self._descriptors.clear()


class LivingState:
    """The state in a worker: a dict that stays where it is."""

    def __init__(self, values: dict[Any, Any]) -> None:
        self._values = values

    def values(self) -> dict[Any, Any]:
        """Return the dict."""
        return self._values

    def keep(self) -> None:
        """Do nothing: it stays."""
