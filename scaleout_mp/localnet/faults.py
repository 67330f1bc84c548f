"""Faults that a local network is told to have, so that clients can be tested against them."""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import grpc


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong with a call, in place of or on top of its usual handling."""

    #: Answer the call with this code; None: handle it.
    code: grpc.StatusCode | None = None
    details: str = "fault injected"
    #: Seconds by which the call is held up first.
    delay: float = 0.0
    #: Download: stop after this many bytes, as if all had been sent.
    truncate: int | None = None
    #: Download: flip a bit of the first byte.
    corrupt: bool = False
    #: Download: send no checksum.
    omit_checksum: bool = False
    #: Upload: answer FAILED.
    refuse: bool = False
    #: The call is handled, then fails with `code`: the answer got lost.
    after: bool = False


class FaultPlan:
    """Faults by method name, each for a number of calls. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._planned: dict[str, list[tuple[Fault, str | None]]] = {}

    def add(self, method: str, fault: Fault, *, times: int = 1, client_id: str | None = None) -> None:
        """Let the next `times` calls of a method ("SendModelUpdate"), of one client or of any, have a fault."""
        with self._lock:
            self._planned.setdefault(method, []).extend([(fault, client_id)] * times)

    def clear(self) -> None:
        """Drop what is planned."""
        with self._lock:
            self._planned.clear()

    def take(self, method: str, client_id: str) -> Fault | None:
        """Return the fault of this call, and count it. Called by the combiner."""
        with self._lock:
            planned = self._planned.get(method, [])
            for index, (fault, wanted) in enumerate(planned):
                if wanted is None or wanted == client_id:
                    del planned[index]
                    return fault
        return None
