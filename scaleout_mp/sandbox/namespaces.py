"""Namespaces of the kernel, made without privilege where it allows: a process's own users, network, IPC and mounts.

Facts: user_namespaces(7), network_namespaces(7), ipc_namespaces(7), mount_namespaces(7), unshare(2).
"""

from __future__ import annotations

import ctypes
import enum
import fcntl
import os
import socket
import struct
from typing import Final

from scaleout_mp.sandbox.process import write_file

_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 0x1

_libc: Final = ctypes.CDLL(None, use_errno=True)


class Namespace(enum.IntFlag):
    """CLONE_NEW*."""

    MOUNT = 0x00020000
    IPC = 0x08000000
    USER = 0x10000000
    PID = 0x20000000
    NETWORK = 0x40000000


def enter_own_users() -> None:
    """Become the only user there is, under the same number, with all privileges over what is made from now on.

    Files and processes of others are still theirs; what this user's privileges outside were is gone for good.
    Raises OSError.
    """
    user, group = os.geteuid(), os.getegid()
    _unshare(Namespace.USER)
    # Without this the kernel lets nobody unprivileged map a group: it could leave one that denies it something.
    write_file("/proc/self/setgroups", b"deny")
    write_file("/proc/self/uid_map", f"{user} {user} 1".encode())
    write_file("/proc/self/gid_map", f"{group} {group} 1".encode())


def enter_own_network() -> None:
    """Have no network but a loopback of its own, which works: processes of a task talk through it. Raises OSError."""
    _unshare(Namespace.NETWORK)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        request = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack_from("16xh", fcntl.ioctl(control, _SIOCGIFFLAGS, request))
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def enter_own_ipc() -> None:
    """See no System V memory, queues and semaphores, and no POSIX queues, of processes outside. Raises OSError."""
    _unshare(Namespace.IPC)


def enter_own_pids() -> None:
    """Have the next child be the first process of a namespace of pids. Raises OSError."""
    _unshare(Namespace.PID)


def enter_own_mounts() -> None:
    """Get a copy of the tree of mounts; changes of either stay its own. Raises OSError."""
    _unshare(Namespace.MOUNT)


def _unshare(flags: Namespace) -> None:
    if _libc.unshare(ctypes.c_int(flags)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"unshare of {flags.name}: {os.strerror(number)}")
