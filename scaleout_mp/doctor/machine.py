"""What this machine offers. All of it is tried out, in processes that are thrown away."""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import os
import platform
import resource
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.config.machine import usable_cores, usable_memory
from scaleout_mp.sandbox import landlock, namespaces, probe, process, seccomp, tree
from scaleout_mp.sandbox.cgroup import MemoryGroups, find_tree_group

if TYPE_CHECKING:
    from collections.abc import Callable

_SHARED_MEMORY: Final = "/dev/shm"  # noqa: S108

_YAMA: Final = {
    "0": "0: of the same user all",
    "1": "1: descendants only",
    "2": "2: root only",
    "3": "3: nobody",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offer:
    """One thing that the machine has, or has not."""

    #: Stable, for machines.
    key: str
    #: For people.
    name: str
    value: str
    #: False: it would help and is not there; None: good or bad is not the question.
    good: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-serialisable values."""
        return dataclasses.asdict(self)


def survey() -> list[Offer]:
    """Return what there is. Call it in a process of one thread: it forks."""
    return [*_system(), *_kernel(), *_namespaces(), *_groups(), *_bounds()]


def _system() -> list[Offer]:
    user = os.geteuid()
    who = "root: tasks keep root's access to files, up to level strict" if user == 0 else f"uid {user}"
    return [
        Offer(key="kernel", name="kernel", value=f"{platform.system()} {platform.release()} {platform.machine()}"),
        Offer(key="python", name="Python", value=platform.python_version()),
        Offer(key="user", name="user", value=who, good=None if user else False),
        Offer(key="cores", name="processors", value=str(usable_cores())),
        Offer(key="memory", name="memory", value=_size(usable_memory())),
        Offer(key="torch", name="PyTorch", value=_installed("torch")),
        Offer(key="gpus", name="GPUs", value=", ".join(_gpus()) or "none"),
    ]


def _kernel() -> list[Offer]:
    return [
        _landlock(),
        _tried("seccomp", "system call filter", _install_filter),
        _tried("pidfd", "pidfd", lambda: os.close(os.pidfd_open(os.getpid()))),
        _tried("tag", "marks of task trees", lambda: tree.wear_tag(tree.new_tag())),
        Offer(key="yama", name="ptrace (yama)", value=_yama()),
    ]


def _landlock() -> Offer:
    try:
        version = landlock.abi()
    except OSError as error:
        return Offer(key="landlock", name="Landlock", value=f"no: {error.strerror}", good=False)

    def restrict() -> None:
        process.forbid_new_privileges()
        with landlock.Ruleset(files=True) as rules:
            rules.restrict()

    refused = probe.refusal(restrict)
    if refused is not None:
        return Offer(key="landlock", name="Landlock", value=f"no: {refused}", good=False)
    lacks = [
        what for what, since in (("signals", landlock.SCOPES_SINCE), ("TCP", landlock.TCP_SINCE)) if version < since
    ]
    missing = f" (no say about {' and '.join(lacks)})" if lacks else ""
    return Offer(key="landlock", name="Landlock", value=f"version {version}{missing}", good=not lacks)


def _install_filter() -> None:
    process.forbid_new_privileges()
    seccomp.install(seccomp.build_base([os.getppid()]))
    seccomp.install(seccomp.build_own(os.getppid()))


def _namespaces() -> list[Offer]:
    kinds: list[tuple[str, Callable[[], object]]] = [
        ("network", namespaces.enter_own_network),
        ("ipc", namespaces.enter_own_ipc),
        ("mount", namespaces.enter_own_mounts),
        ("pid", namespaces.enter_own_pids),
    ]
    offers = [_tried("user_namespace", "user namespace", namespaces.enter_own_users)]
    for kind, enter in kinds:

        def both(enter: Callable[[], object] = enter) -> None:
            # A refusal of the first is no news, where the second works without: as root of a container.
            probe_users = probe.refusal(namespaces.enter_own_users)
            if probe_users is None:
                namespaces.enter_own_users()
            enter()

        label = kind.upper() if kind in {"ipc", "pid"} else kind
        offers.append(_tried(f"{kind}_namespace", f"{label} namespace", both))
    return offers


def _groups() -> list[Offer]:
    groups = None
    try:
        groups = MemoryGroups.find()
        memory = Offer(key="memory_cgroup", name="memory cgroup", value=f"version {groups.version}", good=True)
    except OSError as error:
        memory = Offer(key="memory_cgroup", name="memory cgroup", value=f"no: {error.strerror}", good=False)
    try:
        tree_group = find_tree_group(groups)
        still = "yes"
        if groups is None or groups.base != tree_group.folder:
            tree_group.remove()
    except OSError as error:
        still = f"no, the mark of a tree finds what to kill: {error.strerror}"
    if groups is not None:
        groups.close()
    return [memory, Offer(key="tree_cgroup", name="cgroup of task trees", value=still)]


def _bounds() -> list[Offer]:
    shared = os.statvfs(_SHARED_MEMORY) if os.path.isdir(_SHARED_MEMORY) else None
    size = 0 if shared is None else shared.f_blocks * shared.f_frsize
    names = {
        "RLIMIT_NOFILE": resource.RLIMIT_NOFILE,
        "RLIMIT_NPROC": resource.RLIMIT_NPROC,
        "RLIMIT_MEMLOCK": resource.RLIMIT_MEMLOCK,
    }
    return [
        Offer(
            key="shared_memory",
            name=_SHARED_MEMORY,
            value=_size(size) if size else "none: multiprocessing and PyTorch's data loaders need it",
            good=size >= 1 << 30,
        ),
        *(Offer(key=name, name=name, value=_limits(kind)) for name, kind in names.items()),
    ]


def _tried(key: str, name: str, action: Callable[[], object]) -> Offer:
    refused = probe.refusal(action)
    return Offer(key=key, name=name, value="yes" if refused is None else f"no: {refused}", good=refused is None)


def _yama() -> str:
    try:
        with open("/proc/sys/kernel/yama/ptrace_scope", encoding="ascii") as file:
            value = file.read().strip()
    except OSError:
        return "not there: processes of one user can look into each other"
    return _YAMA.get(value, value)


def _limits(kind: int) -> str:
    soft, hard = ("unlimited" if value == resource.RLIM_INFINITY else str(value) for value in resource.getrlimit(kind))
    return soft if soft == hard else f"{soft}, at most {hard}"


def _installed(module: str) -> str:
    # Not imported: it takes seconds, and CUDA must not be initialised here.
    return "not installed" if importlib.util.find_spec(module) is None else "installed"


def _gpus() -> list[str]:
    return sorted(glob.glob("/dev/nvidia[0-9]*") + glob.glob("/dev/kfd"))


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
