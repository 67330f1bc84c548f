"""How to get more out of a machine."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scaleout_mp.doctor.machine import Offer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advice:
    """One thing to do, and what for."""

    key: str
    #: What would be better.
    what: str
    #: What to do, line by line.
    how: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-serialisable values."""
        return {"key": self.key, "what": self.what, "how": list(self.how)}


_GROUPS: Final = Advice(
    key="memory_cgroup",
    what="Memory limits without any delay, kept by the kernel: let the client make memory cgroups.",
    how=(
        "In the systemd unit of the client:",
        "    [Service]",
        "    Delegate=yes",
        "Without a unit: systemd-run --user --scope -p Delegate=yes ...",
        "In docker: --cgroupns=private and a writable /sys/fs/cgroup.",
    ),
)
_LANDLOCK: Final = Advice(
    key="landlock",
    what="Files out of reach at level strict, other processes at level auto: Landlock.",
    how=(
        "It needs Linux 5.13, 6.7 for TCP and 6.12 for signals, and landlock in the kernel's list of",
        "security modules: lsm=landlock,... on the kernel's command line (see /sys/kernel/security/lsm).",
    ),
)
_FILTER: Final = Advice(
    key="seccomp",
    what="A system call filter, which also keeps tasks in their tree.",
    how=("It needs CONFIG_SECCOMP_FILTER, on x86_64 or aarch64.",),
)
_SHARED_MEMORY: Final = Advice(
    key="shared_memory",
    what="Room for PyTorch's data loaders in /dev/shm.",
    how=("In docker: --shm-size=1g (its default is 64 MiB).",),
)
_ROOT: Final = Advice(
    key="user",
    what="Run the client as an ordinary user: a task up to level auto reads and writes the files of all users.",
    how=("In the systemd unit: User=...; in docker: --user.",),
)


def advise(offers: Sequence[Offer]) -> list[Advice]:
    """Return what would help here."""
    lacking = {offer.key for offer in offers if offer.good is False}
    advice = [each for each in (_ROOT, _LANDLOCK, _FILTER, _GROUPS, _SHARED_MEMORY) if each.key in lacking]
    if {"user_namespace", "network_namespace", "mount_namespace"} & lacking:
        advice.append(_about_namespaces())
    return advice


def _about_namespaces() -> Advice:
    how = []
    if _sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1":
        how.append("sysctl -w kernel.apparmor_restrict_unprivileged_userns=0 (or an AppArmor profile with userns)")
    if _sysctl("kernel/unprivileged_userns_clone") == "0":
        how.append("sysctl -w kernel.unprivileged_userns_clone=1")
    if _sysctl("user/max_user_namespaces") == "0":
        how.append("sysctl -w user.max_user_namespaces=10000")
    if os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv") or not how:
        how.append("In docker: --security-opt seccomp=unconfined, or a profile with unshare, mount and pivot_root.")
        how.append("That widens what the container may do: weigh it against what tasks may do without.")
    return Advice(
        key="namespaces",
        what="A network, a file tree and shared memory of their own at level strict: user namespaces.",
        how=tuple(how),
    )


def _sysctl(name: str) -> str | None:
    try:
        with open(f"/proc/sys/{name}", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return None
