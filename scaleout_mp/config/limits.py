"""What a task may use, and how long it may take to go."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Final

from scaleout_mp.config.checks import shown
from scaleout_mp.config.machine import usable_memory
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
_TIME: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|min|m|h|d)\s*")
_TIME_UNITS: Final = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}

#: Below this a Python process cannot even start its work.
MIN_MEMORY: Final = 8 * 2**20
#: Sums of a few such numbers still fit what the kernel takes.
MAX_SIZE: Final = 1 << 60
#: Some 31 years; a timer and the kernel's limits take it.
MAX_SECONDS: Final = 10**9
#: What a C int holds: beyond it libraries would see another number, and the kernel has no more of anything.
MAX_COUNT: Final = 2**31 - 1
#: The interpreter, its streams, the channel and a few files.
MIN_OPEN_FILES: Final = 16


def parse_size(value: object, *, field: str) -> int:
    """Return a number of bytes; strings like "512MiB", "2GB" or "1.5 GiB" are understood.

    Raises ConfigError that names `field`, also for more than `MAX_SIZE`. Whether it may be below 0 is the caller's.
    """
    size: float
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        match = _SIZE.fullmatch(value) if isinstance(value, str) else None
        unit = _UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            raise ConfigError(f'{field} must be a number of bytes or a size like "512MiB", not {shown(value)}')
        size = float(match[1]) * unit
    # Compared before it is a whole number: of enough digits, it is infinite.
    if size > MAX_SIZE:
        raise ConfigError(f"{field} must be at most 2**60 bytes, not {shown(value)}")
    return int(size)


def parse_seconds(value: object, *, field: str) -> float:
    """Return a number of seconds; strings like "90s", "10m" or "1.5h" are understood.

    Raises ConfigError that names `field`, also for more than `MAX_SECONDS`. Whether it may be below 0 is the caller's.
    """
    seconds: float
    if isinstance(value, int | float) and not isinstance(value, bool) and not _is_nan(value):
        seconds = value
    else:
        match = _TIME.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise ConfigError(f'{field} must be a number of seconds or a time like "10m", not {shown(value)}')
        seconds = float(match[1]) * _TIME_UNITS[match[2]]
    if seconds > MAX_SECONDS:
        raise ConfigError(f"{field} must be at most 10**9 seconds, not {shown(value)}")
    # Of a whole number far below 0 only the sign counts.
    return float(max(seconds, -MAX_SECONDS))


def _is_nan(value: object) -> bool:
    # `math.isnan` fails for whole numbers that no float can hold.
    return isinstance(value, float) and math.isnan(value)


def _at_least(field: str, value: float, least: int, unit: str) -> None:
    if value < least:
        raise ConfigError(f"{field} must be at least {least}{unit}, not {shown(value)}")


def _above_zero(field: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{field} must be more than 0 seconds, not {value!r}")


def _count(field: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{field} must be a whole number, not {shown(value)}")
    _at_least(field, value, least, "")
    if value > MAX_COUNT:
        raise ConfigError(f"{field} must be at most 2**31 - 1, not {shown(value)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one task, with all its descendants; None means no limit.

    Sizes are numbers of bytes or strings like "2GiB", times numbers of seconds or strings like "10m". A wrong value
    raises ConfigError, which names the field, at construction. How each one is kept, and where its gaps are, is in
    docs/limits.md.
    """

    #: Private memory and swap of the whole tree; a fraction up to 1.0 is of the machine, or of the enclosing cgroup.
    #: Pages of a model that the task only reads are shared and do not count.
    memory: float | str | None = None
    #: From the order to the end.
    wall_time: float | str | None = None
    #: Processor time of the whole tree, user and system.
    cpu_time: float | str | None = None
    #: Without a metric, another record or a look at `check_task_abort()`.
    no_progress: float | str | None = None
    #: Processes and threads of the whole tree at once.
    pids: int | None = None
    #: Descriptors of each process.
    open_files: int | None = None
    #: Each file that the task writes.
    file_size: int | str | None = None
    #: All that is in the task's scratch folder: bytes on the disk, and 512 for each file itself.
    scratch_size: int | str | None = None
    #: How much of the end of standard output, and of standard error, is kept for the report.
    output_bytes: int | str = 8192
    #: Threads of BLAS and OpenMP pools; None: as many as there are processors.
    threads: int | None = None
    #: Time that a task has, once asked to stop, before it is killed. The first half is for the abort alone,
    #: which `check_task_abort()` turns into StoppedException; then comes SIGTERM, and at the end SIGKILL.
    abort_grace: float | str = 5.0

    def __post_init__(self) -> None:
        if self.memory is not None:
            _at_least("memory", self.memory_bytes, MIN_MEMORY, " bytes (8MiB)")
        for field in ("wall_time", "cpu_time", "no_progress"):
            if getattr(self, field) is not None:
                _above_zero(field, parse_seconds(getattr(self, field), field=field))
        _at_least("abort_grace", self.abort_grace_seconds, 0, " seconds")
        for field, least in (("pids", 1), ("open_files", MIN_OPEN_FILES), ("threads", 1)):
            if getattr(self, field) is not None:
                _count(field, getattr(self, field), least)
        for field, size in (("file_size", self.file_size), ("scratch_size", self.scratch_size)):
            if size is not None:
                _at_least(field, parse_size(size, field=field), 0, " bytes")
        _at_least("output_bytes", self.output_size, 0, " bytes")

    @property
    def memory_bytes(self) -> int:
        """The memory limit in bytes; 0 means none."""
        if self.memory is None:
            return 0
        if isinstance(self.memory, float):
            if not 0 < self.memory <= 1:
                raise ConfigError(f"memory must be a fraction above 0 and up to 1.0, or a size, not {self.memory!r}")
            return int(self.memory * usable_memory())
        return parse_size(self.memory, field="memory")

    def seconds(self, field: str) -> float | None:
        """Return one of the times, `wall_time` for example, in seconds; None means no limit."""
        value = getattr(self, field)
        return None if value is None else parse_seconds(value, field=field)

    @property
    def abort_grace_seconds(self) -> float:
        """The grace in seconds."""
        return parse_seconds(self.abort_grace, field="abort_grace")

    @property
    def file_size_bytes(self) -> int:
        """The limit of a file in bytes. Call it only when there is one."""
        return parse_size(self.file_size, field="file_size")

    @property
    def scratch_bytes(self) -> int:
        """The limit of the scratch folder in bytes. Call it only when there is one."""
        return parse_size(self.scratch_size, field="scratch_size")

    @property
    def output_size(self) -> int:
        """Bytes of the end of each stream that are kept."""
        return parse_size(self.output_bytes, field="output_bytes")
