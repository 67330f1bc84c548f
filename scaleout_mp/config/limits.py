"""What a task may use, and how long it may take to go."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Final

from scaleout_mp.errors import ConfigError

_UNITS: Final = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")

#: Below this a Python process cannot even start its work.
MIN_MEMORY: Final = 8 * 2**20


def parse_size(value: int | str, *, field: str) -> int:
    """Return a number of bytes; strings like "512MiB", "2GB" or "1.5 GiB" are understood.

    Raises ConfigError that names `field`.
    """
    if type(value) not in {int, str}:
        raise ConfigError(f'{field} must be a number of bytes or a string like "2GiB", not {value!r}')
    if isinstance(value, int):
        return value
    match = _SIZE.fullmatch(value)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ConfigError(f'{field} must be a size like "512MiB" or "2GiB", not {value!r}')
    return int(float(match[1]) * unit)


def _seconds(value: float | None, *, field: str, zero: bool) -> float | None:
    if value is None:
        return None
    if type(value) not in {int, float} or math.isnan(value):
        raise ConfigError(f"{field} must be a number of seconds or None, not {value!r}")
    if value < 0 or (value == 0 and not zero):
        raise ConfigError(f"{field} must be {'at least' if zero else 'more than'} 0 seconds, not {value!r}")
    return float(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one task, with all its descendants.

    A wrong value raises ConfigError, which names the field, at construction.
    """

    #: Private memory and swap of the whole tree, in bytes or as "2GiB"; pages of the model that the task only
    #: reads are shared and do not count. None: no limit.
    memory: int | str | None = None
    #: Seconds from the start of the process to its end. None: no limit.
    wall_time: float | None = None
    #: Seconds that a task has, once asked to stop, before it is killed. The first half is for the abort alone,
    #: which `check_task_abort()` turns into StoppedException; then comes SIGTERM, and at the end SIGKILL.
    abort_grace: float = 5.0

    def __post_init__(self) -> None:
        if self.memory is not None and self.memory_bytes < MIN_MEMORY:
            raise ConfigError(f"memory must be at least 8MiB, not {self.memory!r}")
        _seconds(self.wall_time, field="wall_time", zero=False)
        if _seconds(self.abort_grace, field="abort_grace", zero=True) is None:
            raise ConfigError("abort_grace must be a number of seconds, not None")

    @property
    def memory_bytes(self) -> int:
        """The memory limit in bytes; 0 means none."""
        return 0 if self.memory is None else parse_size(self.memory, field="memory")
