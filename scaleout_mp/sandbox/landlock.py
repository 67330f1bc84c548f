"""Landlock: rules that a process puts on itself, about files, TCP, and what it can do to processes outside.

Three system calls, without a library and without privilege. A process that has put on any rules is in a *domain*:
whatever else the rules say, it can no longer debug, or read the memory, descriptors and environment of, processes
outside of it. Domains nest, up to 16 deep. Facts: landlock(7), Documentation/userspace-api/landlock.rst.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import os
import stat
import struct
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Iterable

# The same numbers on every architecture but alpha.
_CREATE_RULESET: Final = 444
_ADD_RULE: Final = 445
_RESTRICT_SELF: Final = 446

_GIVE_VERSION: Final = 1
_PATH_BENEATH: Final = 1

_call: Final = ctypes.CDLL(None, use_errno=True).syscall
_call.restype = ctypes.c_long


#: ABI versions.
TCP_SINCE: Final = 4
SCOPES_SINCE: Final = 6


class Access(enum.IntFlag):
    """What can be done to files, LANDLOCK_ACCESS_FS_*."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_FOLDER = 1 << 3
    REMOVE_FOLDER = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHARACTER_DEVICE = 1 << 6
    MAKE_FOLDER = 1 << 7
    MAKE_FILE = 1 << 8
    MAKE_SOCKET = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK_DEVICE = 1 << 11
    MAKE_LINK = 1 << 12
    #: Move or link between folders.
    MOVE = 1 << 13
    TRUNCATE = 1 << 14
    DEVICE_CONTROL = 1 << 15

    @classmethod
    def known(cls, abi: int) -> Access:
        """Return all that a kernel of this ABI understands."""
        highest = 12 + (abi >= 2) + (abi >= 3) + (abi >= 5)
        return cls((1 << (highest + 1)) - 1)


READ: Final = Access.READ_FILE | Access.READ_FOLDER | Access.EXECUTE
#: All that can be done to files that are no devices.
WRITE: Final = (
    READ
    | Access.WRITE_FILE
    | Access.REMOVE_FOLDER
    | Access.REMOVE_FILE
    | Access.MAKE_FOLDER
    | Access.MAKE_FILE
    | Access.MAKE_SOCKET
    | Access.MAKE_FIFO
    | Access.MAKE_LINK
    | Access.MOVE
    | Access.TRUNCATE
)
DEVICE: Final = Access.READ_FILE | Access.WRITE_FILE | Access.TRUNCATE
DRIVER: Final = DEVICE | Access.DEVICE_CONTROL
#: What a rule on something that is no folder may name.
_FOR_FILES: Final = DRIVER | Access.EXECUTE

_NET_TCP: Final = 0b11
_SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS: Final = 0b11


def abi() -> int:
    """Return the version of Landlock that this kernel offers. Raises OSError when it offers none."""
    version = _call(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(_GIVE_VERSION))
    if version < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"no Landlock: {os.strerror(number)}")
    return int(version)


class Ruleset:
    """Rules in the making; `restrict` puts them on."""

    def __init__(self, *, files: bool = False, tcp: bool = False, scoped: bool = True) -> None:
        """Forbid, as far as this kernel can: use of `files` and of `tcp`, signals and abstract sockets to outside.

        Raises OSError when nothing of it can be forbidden.
        """
        version = abi()
        self._handled = Access.known(version) if files else Access(0)
        scopes = _SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS if scoped and version >= SCOPES_SINCE else 0
        ports = _NET_TCP if tcp and version >= TCP_SINCE else 0
        if not files and not scopes and not ports and version >= 2:
            # For the sake of the domain: something has to be handled, and moving is it in any case.
            self._handled = Access.MOVE
        attributes = struct.pack("=QQQ", self._handled, ports, scopes)
        size = 24 if version >= SCOPES_SINCE else 16 if version >= TCP_SINCE else 8
        self._descriptor = _call(
            _CREATE_RULESET, ctypes.c_char_p(attributes[:size]), ctypes.c_size_t(size), ctypes.c_uint(0)
        )
        if self._descriptor < 0:
            raise _error("landlock_create_ruleset")
        if self._handled == Access.MOVE:
            self.allow("/", Access.MOVE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def allow(self, path: str, access: Access) -> None:
        """Allow to use what is at and below a path, through all links to it. A path that is not there is nothing."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                self._allow_open(path, descriptor, access)
            finally:
                os.close(descriptor)

    def allow_all(self, paths: Iterable[str], access: Access) -> None:
        """Allow the same for several paths."""
        for path in paths:
            self.allow(path, access)

    def _allow_open(self, path: str, descriptor: int, access: Access) -> None:
        allowed = access & self._handled
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            allowed &= _FOR_FILES
        if not allowed:
            return
        rule = ctypes.c_char_p(struct.pack("=Qi", allowed, descriptor))
        ruleset = ctypes.c_int(self._descriptor)
        if _call(_ADD_RULE, ruleset, ctypes.c_int(_PATH_BENEATH), rule, ctypes.c_uint(0)) < 0:
            raise _error(f"landlock_add_rule for {path}")

    def restrict(self) -> None:
        """Put the rules on this thread and, from now on, on every descendant. Raises OSError.

        The process was forbidden new privileges before.
        """
        if _call(_RESTRICT_SELF, ctypes.c_int(self._descriptor), ctypes.c_uint(0)) < 0:
            raise _error("landlock_restrict_self")


def _error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")
