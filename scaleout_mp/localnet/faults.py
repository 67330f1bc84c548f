"""Faults that a local network is told to have, so that clients can be tested against them."""

from __future__ import annotations

import dataclasses
import fnmatch
import random
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import grpc


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong with a call, in place of or on top of its usual handling."""

    #: Answer the call with this code; None: handle it. A call of the REST API is answered 503.
    code: grpc.StatusCode | None = None
    details: str = "fault injected"
    #: REST: answer with this HTTP status instead.
    status: int | None = None
    #: Seconds by which the call is held up first.
    delay: float = 0.0
    #: Download: stop after this many bytes, as if all had been sent.
    truncate: int | None = None
    #: Download: flip a bit of the first byte.
    corrupt: bool = False
    #: Download: send no checksum.
    omit_checksum: bool = False
    #: Combiner: never answer, and go silent after this many bytes of an upload or download. None: answer.
    hang: int | None = None
    #: Upload: answer FAILED.
    refuse: bool = False
    #: The call is handled, then fails with `code` or `status`: the answer got lost. REST: 504 without either of them.
    after: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Standing:
    methods: str
    fault: Fault
    share: float
    client_id: str | None


class FaultPlan:
    """Faults by the names of calls. Thread-safe.

    A call of the combiner goes by its method's name, "SendModelUpdate"; one of the REST API by the end of its path,
    "clients/add", "auth/refresh", "clients/token", "clients/enroll", "model-signatures".
    """

    def __init__(self, *, seed: int | None = None) -> None:
        """Draw what happens by chance from `seed`; None: differently each time."""
        self._lock = threading.Lock()
        self._planned: dict[str, list[tuple[Fault, str | None]]] = {}
        self._standing: list[_Standing] = []
        self._random = random.Random(seed)  # noqa: S311 - faults, not secrets

    def add(self, method: str, fault: Fault, *, times: int = 1, client_id: str | None = None) -> None:
        """Let the next `times` calls of a method, of one client or of any, have a fault."""
        with self._lock:
            self._planned.setdefault(method, []).extend([(fault, client_id)] * times)

    def always(self, methods: str, fault: Fault, *, share: float = 1.0, client_id: str | None = None) -> None:
        """Let calls have a fault from now on: a share of them, drawn by chance.

        `methods` is a name or a pattern, "*" or "Send*". Delays of several add up; of all else the first counts.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share must be from 0 to 1, not {share!r}")
        with self._lock:
            self._standing.append(_Standing(methods=methods, fault=fault, share=share, client_id=client_id))

    def clear(self) -> None:
        """Drop what is planned and what stands."""
        with self._lock:
            self._planned.clear()
            self._standing.clear()

    def planned(self, method: str) -> int:
        """Return how many calls of a method are still to have a planned fault."""
        with self._lock:
            return len(self._planned.get(method, []))

    def take(self, method: str, client_id: str) -> Fault | None:
        """Return the fault of this call, and count it. Called by combiner and REST API."""
        with self._lock:
            found = [fault for fault in (self._next_planned(method, client_id),) if fault is not None]
            found += [
                rule.fault
                for rule in self._standing
                if rule.client_id in {None, client_id}
                and fnmatch.fnmatchcase(method, rule.methods)
                and self._random.random() < rule.share
            ]
        if not found:
            return None
        main = next((fault for fault in found if fault != Fault(delay=fault.delay)), found[0])
        return dataclasses.replace(main, delay=sum(fault.delay for fault in found))

    def _next_planned(self, method: str, client_id: str) -> Fault | None:
        planned = self._planned.get(method, [])
        for index, (fault, wanted) in enumerate(planned):
            if wanted is None or wanted == client_id:
                del planned[index]
                return fault
        return None
