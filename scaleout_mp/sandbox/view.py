"""A file tree that holds what a task may use and nothing else, in a mount namespace.

Landlock has no say about sockets with a path, about modes, times and extended attributes, nor about whether a file is
there: what is not in the tree cannot be reached by any of these, and what is there to be read cannot be changed.
Facts: mount_namespaces(7), pivot_root(2), mount_setattr(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import stat
import struct
from typing import TYPE_CHECKING, Final

from scaleout_mp.sandbox.files import SHARED_MEMORY, is_below

if TYPE_CHECKING:
    from collections.abc import Iterable

    from scaleout_mp.sandbox.files import FileAccess

_MS_NOSUID: Final = 0x2
_MS_NODEV: Final = 0x4
_MS_BIND: Final = 0x1000
_MS_REC: Final = 0x4000
_MS_PRIVATE: Final = 0x40000
_MNT_DETACH: Final = 0x2

_AT_FDCWD: Final = -100
_AT_RECURSIVE: Final = 0x8000
_MOUNT_ATTR_RDONLY: Final = 0x1

_MOUNT_SETATTR: Final = 442
_PIVOT_ROOT: Final = {"x86_64": 155, "aarch64": 41}

#: Where the tree may be built: any folder that does not become part of it, or it would hold itself.
_BUILDING_SITES: Final = ("/tmp", "/mnt", "/media", "/srv", "/home", "/opt", "/var")  # noqa: S108
_MOST_LINKS: Final = 40

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def enter(files: FileAccess) -> None:
    """Have this process and its descendants see the files of `files` alone, and a /dev/shm of their own.

    Call it with a mount namespace and privileges over it. The root is read-only. Raises OSError.
    """
    try:
        before = os.getcwd()
    except OSError:
        # It stood in a folder that is gone.
        before = "/"
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    writable = {*files.write, *files.devices, *files.drivers} - {SHARED_MEMORY}
    links, places = _resolve({*files.read, *writable})
    writable_places = {os.path.realpath(path) for path in writable}
    # Opened while the old tree can be walked; the new one is built from these.
    opened = {place: os.open(place, os.O_PATH | os.O_CLOEXEC) for place in sorted(places)}
    try:
        _build(opened, writable_places, links)
    finally:
        for descriptor in opened.values():
            os.close(descriptor)
    with contextlib.suppress(OSError):
        os.chdir(before)


def _resolve(paths: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """Return the symbolic links on the way to those paths that are there, and where the paths end up."""
    links: dict[str, str] = {}
    places = set()
    for path in paths:
        if not os.path.exists(path):
            continue
        place = os.path.realpath(path)
        places.add(place)
        left = [part for part in path.split("/") if part]
        at = "/"
        for _ in range(_MOST_LINKS + len(left)):
            if not left:
                break
            step = os.path.join(at, left.pop(0))
            if os.path.islink(step):
                links[step] = target = os.readlink(step)
                # The rest of the way leads through the target, which may hold links itself.
                whole = os.path.normpath(os.path.join(at, target))
                left = [part for part in whole.split("/") if part] + left
                at = "/"
            else:
                at = step
    return links, places


def _building_site(places: Iterable[str]) -> str:
    for site in _BUILDING_SITES:
        if os.path.isdir(site) and not any(is_below(site, place) for place in places):
            return site
    raise OSError(errno.ENOENT, "no place to build a file tree at: all of them are part of it")


def _build(opened: dict[str, int], writable: set[str], links: dict[str, str]) -> None:
    root = _building_site(opened)
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755")
    bound: list[tuple[str, bool]] = []
    for place, descriptor in opened.items():
        free = place in writable
        if any(is_below(place, above) and (above_free or not free) for above, above_free in bound):
            continue
        target = root + place
        _make_point(target, folder=stat.S_ISDIR(os.fstat(descriptor).st_mode))
        _mount(f"/proc/self/fd/{descriptor}", target, None, _MS_BIND | _MS_REC)
        if not free:
            _make_read_only(target, recursive=True)
        bound.append((place, free))
    for link, leads_to in links.items():
        # Those inside of what was bound came with it.
        if not os.path.lexists(root + link):
            os.makedirs(os.path.dirname(root + link), exist_ok=True)
            os.symlink(leads_to, root + link)
    _make_point(root + SHARED_MEMORY, folder=True)
    _mount("tmpfs", root + SHARED_MEMORY, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=1777")
    # Both at one place: the old root comes to lie on the new one, and is taken away.
    os.chdir(root)
    _checked("pivot_root", _libc.syscall(ctypes.c_long(_PIVOT_ROOT[platform.machine()]), b".", b"."))
    _checked("umount2", _libc.umount2(b".", _MNT_DETACH))
    os.chdir("/")
    _make_read_only("/", recursive=False)


def _make_point(path: str, *, folder: bool) -> None:
    if os.path.lexists(path):
        return
    os.makedirs(path if folder else os.path.dirname(path), exist_ok=True)
    if not folder:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if value is None else os.fsencode(value) for value in (source, target, kind, data)]
    result = _libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])
    _checked(f"mount at {target}", result)


def _make_read_only(path: str, *, recursive: bool) -> None:
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_RDONLY, 0, 0, 0)
    result = _libc.syscall(
        ctypes.c_long(_MOUNT_SETATTR),
        ctypes.c_int(_AT_FDCWD),
        os.fsencode(path),
        ctypes.c_uint(_AT_RECURSIVE if recursive else 0),
        attributes,
        ctypes.c_size_t(len(attributes)),
    )
    _checked(f"mount_setattr of {path}", result)


def _checked(what: str, result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
