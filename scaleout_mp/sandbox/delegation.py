"""Passes controllers on to groups below a cgroup of version 2 that was delegated to this process.

A group that has processes in it cannot do that ("no internal processes"), and a service starts in the very group that
is delegated to it. So whatever is in there moves to a leaf below it first, as systemd asks of its services.
Facts: Documentation/admin-guide/cgroup-v2.rst, systemd's CGROUP_DELEGATION.md.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Final

#: The leaf for the processes that were in the group.
LEAF: Final = "supervisor"
#: Set by systemd on the top of what it delegates: since version 251, and before that for who is privileged.
_MARKS: Final = ("user.delegate", "trusted.delegate")
#: A process may fork while others are moved.
_ROUNDS: Final = 10


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


def _write(path: str, value: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(value)


def delegated(own: str) -> str:
    """Return the group below which groups can be made: `own`, or the one above when `own` is a leaf of ours.

    A leaf is what an earlier executor has made, or systemd for `DelegateSubgroup=`.
    """
    above = os.path.dirname(own)
    return above if is_delegated(above) and (os.path.basename(own) == LEAF or not is_delegated(own)) else own


def is_delegated(folder: str) -> bool:
    """Whether a group was handed over with all below it: to this user, this service or this container."""
    for mark in _MARKS:
        with contextlib.suppress(OSError):
            if os.getxattr(folder, mark) == b"1":
                return True
    try:
        owner, above = os.stat(folder).st_uid, os.stat(os.path.dirname(folder)).st_uid
    except OSError:
        return False
    # Of an older systemd a unit with another user is known by its owner. What belongs to root says nothing, and below
    # the top of a user's own service manager everything is the user's, shells included.
    return owner == os.geteuid() not in {0, above}


def pass_on(folder: str, controller: str) -> None:
    """Have groups below `folder` use a controller. Raises OSError that says what is missing."""
    if controller in _read(f"{folder}/cgroup.subtree_control").split():
        return
    refused = OSError(errno.EPERM, f"{folder} does not pass the {controller} controller on to groups below it")
    try:
        _write(f"{folder}/cgroup.subtree_control", f"+{controller}")
    except OSError as error:
        # Moving the processes of a group that nobody gave us would be rude: a session's shell may be among them.
        if error.errno != errno.EBUSY or not is_delegated(folder):
            raise refused from error
    else:
        return
    for _ in range(_ROUNDS):
        _make_room(folder)
        with contextlib.suppress(OSError):
            _write(f"{folder}/cgroup.subtree_control", f"+{controller}")
            return
    raise refused


def _make_room(folder: str) -> None:
    leaf = f"{folder}/{LEAF}"
    with contextlib.suppress(FileExistsError):
        os.mkdir(leaf)
    for pid in _read(f"{folder}/cgroup.procs").split():
        # It may be gone by now.
        with contextlib.suppress(ProcessLookupError):
            _write(f"{leaf}/cgroup.procs", pid)
