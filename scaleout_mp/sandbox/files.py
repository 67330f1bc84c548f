"""Which files a task may use at level strict: the one list behind Landlock's rules and the mount namespace."""

from __future__ import annotations

import dataclasses
import glob
import os
import sys
from typing import TYPE_CHECKING, Any, Final, Self

from scaleout_mp.sandbox import landlock

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: Programs and libraries.
_SYSTEM: Final = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/nix/store",
    "/gnu/store",
    "/opt/rocm",
    "/opt/intel",
)
#: What the C library, Python and OpenSSL read; no passwords, no keys and no settings of services.
_ETC: Final = (
    "alternatives",
    "ca-certificates",
    "ca-certificates.conf",
    "crypto-policies",
    "debian_version",
    "fonts",
    "gai.conf",
    "group",
    "host.conf",
    "hosts",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "locale.alias",
    "locale.conf",
    "localtime",
    "lsb-release",
    "machine-id",
    "mime.types",
    "nsswitch.conf",
    "nvidia",
    "OpenCL",
    "os-release",
    "passwd",
    "pki/ca-trust",
    "pki/tls/cert.pem",
    "pki/tls/certs",
    "pki/tls/openssl.cnf",
    "protocols",
    "python3*",
    "resolv.conf",
    "services",
    "ssl/cert.pem",
    "ssl/certs",
    "ssl/openssl.cnf",
    "timezone",
    "vulkan",
)
#: What the kernel says about the machine and about processes. Of processes outside, their memory, environment and
#: descriptors stay closed (Landlock's domain), their names and command lines do not.
_KERNEL: Final = ("/proc", "/sys")
_DEVICES: Final = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
#: Accelerators, which are steered by ioctl.
_DRIVERS: Final = ("/dev/nvidia*", "/dev/dri", "/dev/kfd", "/dev/accel", "/dev/infiniband")
#: Where multiprocessing and PyTorch put semaphores and shared memory.
SHARED_MEMORY: Final = "/dev/shm"  # noqa: S108


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileAccess:
    """What may be read, what may be written. Paths are absolute; those that are not there do no harm."""

    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    drivers: tuple[str, ...] = ()

    @classmethod
    def of_this_interpreter(cls, *, read: tuple[str, ...], write: tuple[str, ...], network: bool) -> Self:
        """Return what training code needs here, and what was declared. `network`: names can be looked up as well."""
        etc = [path for name in _ETC for path in glob.glob(f"/etc/{name}")]
        named = ["/run/systemd/resolve", "/run/nscd"] if network else []
        prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
        interpreter = [*sorted(prefixes), os.path.dirname(sys.executable)]
        everything = [*_SYSTEM, *etc, *named, *_KERNEL, *interpreter, *_module_places(), *read]
        return cls(
            read=tuple(dict.fromkeys(os.path.abspath(path) for path in everything if os.path.exists(path))),
            write=(*write, SHARED_MEMORY),
            devices=_DEVICES,
            drivers=tuple(path for pattern in _DRIVERS for path in glob.glob(pattern)),
        )

    def and_write(self, *places: str) -> Self:
        """Return the same with more to write; "" stands for none."""
        return dataclasses.replace(self, write=(*self.write, *filter(None, places)))

    def coarser(self, apart: Sequence[str]) -> Self:
        """Return the same in fewer and larger pieces to read, none of which holds a folder of `apart`.

        For a task, whose template is bound to the fine ones: each rule costs time at its start.
        """
        pieces: dict[str, None] = {}
        for path in self.read:
            top = "/" + path.split("/")[1]
            holds_one = any(is_below(place, top) for place in apart)
            pieces[path if holds_one else top] = None
        return dataclasses.replace(self, read=tuple(pieces))

    def add_to(self, rules: landlock.Ruleset) -> None:
        """Allow it in a ruleset that forbids files."""
        rules.allow_all(self.read, landlock.READ)
        rules.allow_all(self.write, landlock.WRITE)
        rules.allow_all(self.devices, landlock.DEVICE)
        rules.allow_all(self.drivers, landlock.DRIVER | landlock.READ)

    def to_fields(self) -> dict[str, Any]:
        """Return what a frame carries: file names need not be text."""
        return {name: [os.fsencode(path) for path in paths] for name, paths in dataclasses.asdict(self).items()}

    @classmethod
    def from_fields(cls, fields: dict[str, list[bytes]]) -> Self:
        """Read what `to_fields` returned."""
        return cls(**{name: tuple(map(os.fsdecode, paths)) for name, paths in fields.items()})


def is_below(path: str, above: str) -> bool:
    """Whether a normal path is another one or lies in it."""
    return path == above or path.startswith(above.rstrip("/") + "/")


def _module_places() -> Iterator[str]:
    """Yield where modules are found: the search path, and the folders of packages that are installed as editable."""
    yield from (entry for entry in sys.path if entry)
    for finder in sys.meta_path:
        # What setuptools makes of an editable install that is no plain folder.
        mapping = getattr(sys.modules.get(getattr(finder, "__module__", "")), "MAPPING", None)
        if isinstance(mapping, dict):
            yield from (path for path in mapping.values() if isinstance(path, str))
