"""What callbacks keep from task to task, as opaque bytes: only children pickle and unpickle it."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.display import readable_size
from scaleout_mp.errors import ModelFormatError, ProtocolViolation
from scaleout_mp.ipc.channel import close_all
from scaleout_mp.ipc.messages import StateChange
from scaleout_mp.ipc.segments import INLINE
from scaleout_mp.model.memfd import verify_sealed

if TYPE_CHECKING:
    from scaleout_mp.ipc.frames import Frame

logger = logging.getLogger(__name__)

#: Bytes of a pickled state, unless the user says otherwise.
MAX_STATE: Final = 256 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Packed:
    """A state as a child sent it."""

    #: What `segments.store` made of it.
    table: list[Any]
    #: The sealed memory that holds it, when the table does not.
    descriptors: tuple[int, ...] = ()


class StateStore:
    """The states of one executor, by the name that tasks have for them."""

    def __init__(self, most: int = MAX_STATE) -> None:
        """Take states of at most so many bytes each."""
        self._most = most
        self._states: dict[str, _Packed] = {}

    def slot(self, name: str) -> StateSlot:
        """Return what one task has to do with the state of that name."""
        return StateSlot(self, name, self._most)

    def get(self, name: str) -> _Packed | None:
        """Return a state; None: it is empty."""
        return self._states.get(name)

    def put(self, name: str, packed: _Packed | None) -> None:
        """Replace a state and free the one before."""
        before = self._states.pop(name, None)
        if before is not None:
            close_all(before.descriptors)
        if packed is not None:
            self._states[name] = packed

    def close(self) -> None:
        """Free all."""
        for name in list(self._states):
            self.put(name, None)


class StateSlot:
    """One task's access to a state: it gets what is there, and what it sends counts once the task has completed."""

    def __init__(self, store: StateStore, name: str, most: int) -> None:
        self._store = store
        self.name = name
        self._most = most
        self._touched = False
        #: The task reads what is there, or has died of that.
        self._opening = False
        self._sent: _Packed | None = None

    def fields(self) -> tuple[list[Any], tuple[int, ...]]:
        """Return what the TASK frame carries, and the descriptors beside it, which stay the store's."""
        packed = self._store.get(self.name)
        if packed is None:
            return [self.name, self._most, None], ()
        return [self.name, self._most, [bool(packed.descriptors), packed.table]], packed.descriptors

    def receive(self, frame: Frame) -> None:
        """Take a STATE frame. Raises ProtocolViolation."""
        try:
            change, packed = self._parse(frame)
        except ProtocolViolation:
            close_all(frame.descriptors)
            raise
        self._opening = change is StateChange.OPENING
        self._touched = self._touched or not self._opening
        if change is StateChange.UNREADABLE:
            self._store.put(self.name, None)
            logger.warning(
                "state %s cannot be read any more: the next task finds it empty",
                self.name,
                extra={"action": "state_dropped", "state": self.name},
            )
        elif packed is not None:
            self._drop()
            self._sent = packed

    def _parse(self, frame: Frame) -> tuple[StateChange, _Packed | None]:
        change = frame.fields[0] if len(frame.fields) == 2 else None
        if type(change) is not str or change not in set(StateChange):
            raise ProtocolViolation("a STATE frame does not say what happened to the state")
        change, table = StateChange(frame.fields[0]), frame.fields[1]
        if change is not StateChange.KEPT:
            if frame.descriptors:
                raise ProtocolViolation("a STATE frame came with descriptors that it has no use for")
            return change, None
        if not isinstance(table, list) or len(table) != 1 or len(frame.descriptors) > 1:
            raise ProtocolViolation("a state is not one piece")
        size = self._size(table[0], frame.descriptors)
        if size > self._most:
            raise ProtocolViolation(f"a state of {size} bytes came; at most {self._most} are kept")
        return change, _Packed(table=table, descriptors=tuple(frame.descriptors))

    @staticmethod
    def _size(segment: Any, descriptors: list[int]) -> int:
        if not descriptors:
            if type(segment) is not bytes or len(segment) > INLINE:
                raise ProtocolViolation("a state without memory is no short byte string")
            return len(segment)
        if type(segment) is not int or segment < 0:
            raise ProtocolViolation("a state has a size that is none")
        try:
            verify_sealed(descriptors[0])
        except ModelFormatError as error:
            raise ProtocolViolation(f"a state came in memory that is not sealed: {error}") from error
        return os.fstat(descriptors[0]).st_size

    def _drop(self) -> None:
        if self._sent is not None:
            close_all(self._sent.descriptors)
            self._sent = None

    def settle(self, task: str, *, completed: bool, asked: bool = False) -> None:
        """Keep what the task sent, or drop it with a warning if the task did not complete. Called once, at the end.

        `asked`: somebody wanted the task to end.
        """
        if completed:
            if self._sent is not None:
                self._store.put(self.name, self._sent)
                self._sent = None
            return
        self._drop()
        if self._opening and not asked:
            self._store.put(self.name, None)
            logger.warning(
                "state %s is dropped, for task %s ended while it read it: the next one finds it empty",
                self.name,
                task,
                extra={"action": "state_dropped", "state": self.name},
            )
        elif self._touched:
            before = self._store.get(self.name)
            size = 0 if before is None else _size_of(before)
            logger.warning(
                "what task %s wrote into its state %s is dropped, for the task did not complete: the next one finds %s",
                task,
                self.name,
                f"what was there before ({readable_size(size)})" if before is not None else "it empty",
                extra={"action": "state_dropped", "state": self.name},
            )


def _size_of(packed: _Packed) -> int:
    segment = packed.table[0]
    return segment if isinstance(segment, int) else len(segment)
