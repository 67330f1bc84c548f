"""The misbehaviour that the demo plans: who does what in which round, and how it must end."""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import signal
import time
from typing import TYPE_CHECKING, Final, NoReturn, Self

import numpy as np

from scaleout_mp.errors import ConfigError
from scaleout_mp.task import EndReason

if TYPE_CHECKING:
    from collections.abc import Sequence

#: With fewer rounds some round would be left with too few healthy clients, or a faulty client without a round to
#: come back in.
MIN_ROUNDS: Final = 3

#: How much a leak grows by and how often: fast, but slow enough to be watched.
_LEAK_STEP: Final = 2 * 2**20
_LEAK_PAUSE: Final = 0.015


class FaultKind(enum.StrEnum):
    """What a train callback does wrong."""

    SEGFAULT = "segfault"
    LEAK = "leak"
    HANG = "hang"
    RAISE = "raise"

    @property
    def description(self) -> str:
        """What is planned, for people."""
        return _DESCRIPTIONS[self]

    @property
    def expected(self) -> ExpectedEnd:
        """How a task with this fault must end."""
        return _EXPECTED[self]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedEnd:
    """An end as the server hears of it."""

    #: Status of the activity report.
    status: str
    reason: EndReason
    #: What the line that explains the end must contain.
    mentions: str


_DESCRIPTIONS: Final = {
    FaultKind.SEGFAULT: "reads memory at address 0",
    FaultKind.LEAK: "keeps allocating past its memory limit",
    FaultKind.HANG: "hangs in a native call, with the GIL held and SIGTERM ignored",
    FaultKind.RAISE: "raises an exception",
}

_EXPECTED: Final = {
    FaultKind.SEGFAULT: ExpectedEnd(status="FAILED", reason=EndReason.CRASHED, mentions="SIGSEGV"),
    FaultKind.LEAK: ExpectedEnd(status="FAILED", reason=EndReason.MEMORY_LIMIT, mentions="limit of"),
    FaultKind.HANG: ExpectedEnd(status="INTERRUPTED", reason=EndReason.TIMED_OUT_BY_SERVER, mentions="SIGKILL"),
    FaultKind.RAISE: ExpectedEnd(status="FAILED", reason=EndReason.FAILED, mentions="ValueError"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedFault:
    """One fault: a client's training misbehaves in one round."""

    #: Name of the client.
    client: str
    #: 1 for the first round.
    round: int
    kind: FaultKind

    @classmethod
    def parse(cls, text: str, *, client: str) -> Self:
        """Read "segfault:2"; raises ConfigError."""
        kind, _, number = text.partition(":")
        if kind not in list(FaultKind) or not number.isdigit():
            raise ConfigError(f"a fault is a kind and a round, such as segfault:2, not {text!r}")
        return cls(client=client, round=int(number), kind=FaultKind(kind))

    def __str__(self) -> str:
        return f"{self.kind}:{self.round}"


def plan_faults(clients: Sequence[str], rounds: int) -> tuple[PlannedFault, ...]:
    """Give each of four clients one fault, spread over the rounds; none in the last, so that all come back.

    Raises ConfigError when there are too few rounds for that.
    """
    if rounds < MIN_ROUNDS:
        raise ConfigError(f"the planned faults need at least {MIN_ROUNDS} rounds, not {rounds}; or use --no-faults")
    # The first round shows the session healthy, and one healthy round in the middle shows it recovered.
    numbers = (2, 3, 5, 6) if rounds > 6 else tuple(1 + index % (rounds - 1) for index in range(len(FaultKind)))
    return tuple(
        PlannedFault(client=client, round=number, kind=kind)
        for client, number, kind in zip(clients, numbers, FaultKind, strict=True)
    )


def commit(kind: FaultKind) -> NoReturn:
    """Misbehave. Called by a train callback, in its task's process."""
    if kind is FaultKind.SEGFAULT:
        ctypes.string_at(0)
    if kind is FaultKind.LEAK:
        _leak()
    if kind is FaultKind.HANG:
        _hang()
    raise ValueError("image 41 is labelled 17")


def _leak() -> NoReturn:
    kept = []
    while True:
        kept.append(np.ones(_LEAK_STEP, np.uint8))
        time.sleep(_LEAK_PAUSE)


def _hang() -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        # PyDLL keeps the GIL during the call: no other Python code of the process runs, the abort goes unseen.
        ctypes.PyDLL(None).pause()
