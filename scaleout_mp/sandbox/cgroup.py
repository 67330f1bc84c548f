"""A memory cgroup for each task, of version 2 or 1, where one can be made.

The kernel then counts and bounds all memory of the task's tree, also what is mapped by nobody, and kills at the limit
without any delay. Facts: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst, cgroups(7).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import secrets
import time
from typing import Final, Protocol, Self

from scaleout_mp.sandbox import delegation
from scaleout_mp.sandbox.tree_group import TreeGroup

logger = logging.getLogger(__name__)

_PREFIX: Final = "scaleout-mp"
#: Seconds that a group may stay busy after its last process is gone: version 1 frees pages in the background.
_BUSY_SECONDS: Final = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """What a group says."""

    #: Bytes that cannot be given back: without the files that were read.
    now: int
    #: Bytes, with the files that were read; at most the limit.
    peak: int
    #: Processes that the kernel killed because the group was at its limit.
    oom_kills: int


class MemoryGroup(Protocol):
    """The group of one task."""

    #: As reports name it.
    NAME: str

    @property
    def procs(self) -> str:
        """The file into which a process writes "0" to join."""
        ...

    def use(self) -> MemoryUse:
        """Read the counters. Raises OSError once the group is gone."""
        ...

    def holds(self, pid: int) -> bool:
        """Whether a process is in the group; also when it is gone."""
        ...

    def kill(self) -> None:
        """Kill all that is in the group, at once and whatever it forks meanwhile, where the kernel does that."""
        ...

    def remove(self) -> None:
        """Remove the group; its processes must be gone."""
        ...


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


def _write(path: str, value: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(value)


def _fields(path: str) -> dict[str, int]:
    pairs = (line.split() for line in _read(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _remove(folder: str) -> None:
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            for below, _, _ in os.walk(folder, topdown=False):
                os.rmdir(below)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                logger.warning("cannot remove %s: %s", folder, error, extra={"action": "cgroup_left"})
                return
            time.sleep(0.002)
        else:
            return


def kill_all(folder: str) -> None:
    """Kill all that is in a group, where the kernel can: one of version 2, since Linux 5.14."""
    with contextlib.suppress(OSError), open(f"{folder}/cgroup.kill", "r+", encoding="ascii") as file:
        file.write("1")


class _Group:
    def __init__(self, folder: str) -> None:
        self._folder = folder

    @property
    def procs(self) -> str:
        return f"{self._folder}/cgroup.procs"

    def holds(self, pid: int) -> bool:
        try:
            groups = _read(f"/proc/{pid}/cgroup")
        except OSError:
            return True
        # Its name is the task's tag, which is in no other group's name.
        return f"/{os.path.basename(self._folder)}" in groups

    def kill(self) -> None:
        kill_all(self._folder)

    def remove(self) -> None:
        _remove(self._folder)


class _GroupV2(_Group):
    NAME = "memory cgroup of version 2"

    def __init__(self, folder: str, limit: int) -> None:
        super().__init__(folder)
        os.mkdir(folder)
        try:
            _write(f"{folder}/memory.max", str(limit))
            # Swap would only delay the end.
            with contextlib.suppress(OSError):
                _write(f"{folder}/memory.swap.max", "0")
            # One task, one fate.
            with contextlib.suppress(OSError):
                _write(f"{folder}/memory.oom.group", "1")
        except OSError:
            _remove(folder)
            raise

    def use(self) -> MemoryUse:
        stat = _fields(f"{self._folder}/memory.stat")
        now = stat.get("anon", 0) + stat.get("shmem", 0)
        try:
            peak = int(_read(f"{self._folder}/memory.peak"))
        except OSError:
            # Since Linux 5.19.
            peak = now
        return MemoryUse(now=now, peak=peak, oom_kills=_fields(f"{self._folder}/memory.events").get("oom_kill", 0))


class _GroupV1(_Group):
    NAME = "memory cgroup of version 1"

    def __init__(self, folder: str, limit: int) -> None:
        super().__init__(folder)
        os.mkdir(folder)
        try:
            _write(f"{folder}/memory.limit_in_bytes", str(limit))
            # Memory and swap together; there only where swap is accounted.
            with contextlib.suppress(OSError):
                _write(f"{folder}/memory.memsw.limit_in_bytes", str(limit))
        except OSError:
            _remove(folder)
            raise

    def use(self) -> MemoryUse:
        stat = _fields(f"{self._folder}/memory.stat")
        return MemoryUse(
            now=stat.get("total_rss", 0) + stat.get("total_shmem", 0) + stat.get("total_swap", 0),
            peak=int(_read(f"{self._folder}/memory.max_usage_in_bytes")),
            oom_kills=_fields(f"{self._folder}/memory.oom_control").get("oom_kill", 0),
        )


class MemoryGroups:
    """Where this process may make groups for its tasks. Made by `find`."""

    def __init__(self, base: str, version: int) -> None:
        self._base = base
        #: Of the cgroup interface, 1 or 2.
        self.version = version

    @property
    def base(self) -> str:
        """The folder that holds the groups."""
        return self._base

    @classmethod
    def find(cls) -> Self:
        """Make a folder for groups below this process's own group. Raises OSError that says what is missing."""
        try:
            groups = cls._find_v2()
        except OSError as error:
            second_reason = error
        else:
            return groups
        try:
            return cls._find_v1()
        except OSError as error:
            raise OSError(error.errno, f"no memory cgroup: version 2: {second_reason}; version 1: {error}") from error

    @classmethod
    def _find_v2(cls) -> Self:
        own = delegation.delegated(_own_folder(""))
        if "memory" not in _read(f"{own}/cgroup.controllers").split():
            raise OSError(errno.ENOSYS, f"{own} has no memory controller")
        delegation.pass_on(own, "memory")
        return cls._make_base(own, 2)

    @classmethod
    def _find_v1(cls) -> Self:
        return cls._make_base(_own_folder("memory"), 1)

    @classmethod
    def _make_base(cls, own: str, version: int) -> Self:
        base = _new_base(own)
        os.mkdir(base)
        try:
            if version == 2:
                _write(f"{base}/cgroup.subtree_control", "+memory")
            groups = cls(base, version)
            # Whether limits can be set shows only on a try.
            groups.make("probe", 1 << 30).remove()
        except OSError:
            _remove(base)
            raise
        return groups

    def make(self, name: str, limit: int) -> MemoryGroup:
        """Make the group of one task, of `limit` bytes. Raises OSError."""
        return (_GroupV2 if self.version == 2 else _GroupV1)(f"{self._base}/{name}", limit)

    def close(self) -> None:
        """Remove the folder."""
        _remove(self._base)


def find_tree_group(memory: MemoryGroups | None) -> TreeGroup:
    """Return the group around all templates of an executor; it may be that of its `memory` groups.

    Raises OSError that says what is missing.
    """
    if memory is not None and memory.version == 2:
        return TreeGroup(memory.base)
    return TreeGroup.make(_new_base(delegation.delegated(_own_folder(""))))


def _new_base(own: str) -> str:
    return f"{own}/{_PREFIX}-{os.getpid()}-{secrets.token_hex(4)}"


def _own_folder(controller: str) -> str:
    """Return the folder of this process's group; `controller` is "" for version 2."""
    path = next(
        (
            line.split(":", 2)[2]
            for line in _read("/proc/self/cgroup").splitlines()
            if controller in line.split(":", 2)[1].split(",")
        ),
        None,
    )
    if path is None:
        raise OSError(errno.ENOENT, f"this process is in no {controller or 'version 2'} group")
    kind = "cgroup" if controller else "cgroup2"
    for line in _read("/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        root, mount_point = before.split()[3:5]
        file_system, _, options = after.split(" ", 2)
        if file_system == kind and (not controller or controller in options.split(",")):
            inside = os.path.relpath(path, root) if path.startswith(root) else path.lstrip("/")
            return os.path.normpath(f"{mount_point}/{inside}")
    raise OSError(errno.ENOENT, f"no {kind} file system for {controller or 'version 2'} is mounted")


def remove_left_over(base: str) -> None:
    """Remove the groups of supervisors that are gone, beside `base`; those of living ones are left alone."""
    parent = os.path.dirname(base)
    for name in os.listdir(parent):
        parts = name.rsplit("-", 2)
        if len(parts) != 3 or parts[0] != _PREFIX or not parts[1].isdigit() or os.path.exists(f"/proc/{parts[1]}"):
            continue
        _remove(f"{parent}/{name}")
