"""What a task gets of the machine beside its limits, and what all tasks together may have."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Sequence
from typing import Final

from scaleout_mp.config.checks import shown
from scaleout_mp.config.limits import MIN_MEMORY, parse_size
from scaleout_mp.config.machine import usable_memory
from scaleout_mp.errors import ConfigError

#: The variables that name a process's GPUs. Not ROCR_VISIBLE_DEVICES: HIP counts anew within what that one leaves, so
#: both together would hide all but the first (https://rocm.docs.amd.com, GPU isolation techniques).
_GPU_VARIABLES: Final = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")
#: No device has it. HIP takes an empty list for none at all.
_NO_GPU: Final = "-1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """What one task gets of the machine. A wrong value raises ConfigError, which names the field, at construction."""

    #: How many of the executor's `gpus` the task has to itself while it runs.
    gpus: int = 0
    #: Added to the niceness of the client: 0 to 19; the higher, the more it gives way to others.
    nice: int = 0
    #: Numbers of the processors on which it runs; None: all that the client has. Unless `Limits(threads=...)` says
    #: otherwise, numerical libraries then start as many threads.
    affinity: Collection[int] | None = None

    def __post_init__(self) -> None:
        if type(self.gpus) is not int or self.gpus < 0:
            raise ConfigError(f"gpus must be a whole number from 0, not {self.gpus!r}")
        if type(self.nice) is not int or not 0 <= self.nice <= 19:
            raise ConfigError(f"nice must be a whole number from 0 to 19, not {self.nice!r}")
        if self.affinity is None:
            return
        given: object = self.affinity
        usable = os.sched_getaffinity(0)
        numbers = list(given) if isinstance(given, Collection) else []
        if not numbers or not all(type(number) is int and number in usable for number in numbers):
            raise ConfigError(f"affinity must be some of the processors {sorted(usable)}, not {given!r}")
        object.__setattr__(self, "affinity", frozenset(numbers))


def parse_memory_budget(budget: float | str | None) -> int | None:
    """Return a budget in bytes; a fraction up to 1.0 is of the machine or the enclosing cgroup. Raises ConfigError."""
    if budget is None:
        return None
    if isinstance(budget, float):
        if not 0 < budget <= 1:
            raise ConfigError(f"memory_budget must be a fraction above 0 and up to 1.0, or a size, not {budget!r}")
        return int(budget * usable_memory())
    size = parse_size(budget, field="memory_budget")
    if size < MIN_MEMORY:
        raise ConfigError(f"memory_budget must be at least {MIN_MEMORY} bytes (8MiB), not {shown(budget)}")
    return size


def parse_gpus(gpus: Sequence[int | str] | None) -> tuple[str, ...] | None:
    """Return the names of GPUs as the variables that name them have them; None stays. Raises ConfigError."""
    if gpus is None:
        return None
    if isinstance(gpus, str) or not isinstance(gpus, Sequence):
        raise ConfigError(f"gpus must be a list of numbers or names of GPUs, not {gpus!r}")
    names = [str(gpu) if type(gpu) in {int, str} else "" for gpu in gpus]
    if not all(name and "," not in name and not name.startswith("-") and _is_plain(name) for name in names):
        raise ConfigError(f"gpus must be numbers from 0, or names as in CUDA_VISIBLE_DEVICES, not {gpus!r}")
    if len(set(names)) != len(names):
        raise ConfigError(f"gpus names one GPU twice: {gpus!r}")
    return tuple(names)


def _is_plain(name: str) -> bool:
    return name.isascii() and name.isprintable()


def gpu_environment(gpus: Sequence[str]) -> dict[str, str]:
    """Return the variables by which a process sees these GPUs and no other."""
    value = ",".join(gpus) or _NO_GPU
    return dict.fromkeys(_GPU_VARIABLES, value) | ({} if gpus else {"NVIDIA_VISIBLE_DEVICES": "void"})
