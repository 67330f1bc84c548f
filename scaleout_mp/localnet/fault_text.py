"""Faults as people write them on a command line."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

import grpc

from scaleout_mp.errors import ConfigError
from scaleout_mp.localnet.faults import Fault

if TYPE_CHECKING:
    from collections.abc import Callable

    from scaleout_mp.localnet.faults import FaultPlan

_FORM: Final = 'a fault is written like "Download:truncate=1000,times=3" or "Send*:code=UNAVAILABLE,share=0.2"'


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultOrder:
    """A fault, and which calls are to have it."""

    methods: str
    fault: Fault
    #: The next so many calls; None: a share of all calls from now on.
    times: int | None = None
    share: float = 1.0

    def place(self, plan: FaultPlan) -> None:
        """Let the plan have it."""
        if self.times is None:
            plan.always(self.methods, self.fault, share=self.share)
        else:
            plan.add(self.methods, self.fault, times=self.times)


def read_fault(text: str) -> FaultOrder:
    """Read one fault. Raises ConfigError, in one line, that says what is wrong and how it is written."""
    methods, colon, rest = text.partition(":")
    if not methods or not colon or not rest:
        raise ConfigError(f"{text!r} is no fault: {_FORM}")
    values: dict[str, Any] = {}
    for part in rest.split(","):
        name, _, value = part.strip().partition("=")
        reader = _READERS.get(name)
        if reader is None:
            raise ConfigError(f"{name!r} is no fault; known are {', '.join(_READERS)}: {_FORM}")
        try:
            values[name] = reader(value)
        except (ValueError, KeyError):
            raise ConfigError(f"{name} cannot be {value!r}: {_FORM}") from None
    times, share = values.pop("times", None), values.pop("share", 1.0)
    if times is not None and ("*" in methods or share != 1.0):
        raise ConfigError(f"times goes with the name of one call and without share: {_FORM}")
    return FaultOrder(methods=methods, fault=Fault(**values), times=times, share=share)


def _flag(text: str) -> bool:
    return {"": True, "true": True, "false": False}[text]


def _seconds(text: str) -> float:
    return _within(float(text), 0, 86_400)


def _within(number: float, least: float, most: float) -> float:
    if not least <= number <= most:
        raise ValueError
    return number


_READERS: Final[dict[str, Callable[[str], Any]]] = {
    "code": lambda text: grpc.StatusCode[text.upper()],
    "status": lambda text: int(_within(int(text), 400, 599)),
    "delay": _seconds,
    "truncate": lambda text: int(_within(int(text), 0, 1 << 62)),
    "hang": lambda text: int(_within(int(text), 0, 1 << 62)),
    "corrupt": _flag,
    "omit_checksum": _flag,
    "refuse": _flag,
    "after": _flag,
    "details": str,
    "times": lambda text: int(_within(int(text), 1, 1 << 20)),
    "share": lambda text: _within(float(text), 0, 1),
}
