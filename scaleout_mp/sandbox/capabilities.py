"""Take privileges from a process for good: what training code as root has no use for, or all of them.

Facts: capabilities(7), capset(2).
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

from scaleout_mp.sandbox.process import prctl

_PR_CAPBSET_READ: Final = 23
_PR_CAPBSET_DROP: Final = 24
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
#: _LINUX_CAPABILITY_VERSION_3
_VERSION: Final = 0x20080522

_SETPCAP: Final = 8

#: What root means to training code: the files of all users (CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID), low
#: ports (NET_BIND_SERVICE) and memory that stays in place for a device (IPC_LOCK). Not among them, say: changing the
#: user, raising hard limits, real-time scheduling, signals to and memory of other processes, mounts, devices.
OF_TRAINING: Final = sum(1 << number for number in (0, 1, 2, 3, 4, 10, 14))

_libc: Final = ctypes.CDLL(None, use_errno=True)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Half(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def keep(allowed: int) -> None:
    """Drop every capability that is not in the mask `allowed`, for this process and its descendants. Raises OSError.

    Where new privileges are forbidden, exec gives nothing back, not even to root.
    """
    header = _Header(_VERSION, 0)
    halves = (_Half * 2)()
    if _libc.capget(ctypes.byref(header), halves) != 0:
        raise _error("capget")
    permitted = halves[0].permitted | halves[1].permitted << 32
    if permitted & ~allowed == 0:
        return
    prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    if permitted >> _SETPCAP & 1:
        _bound(allowed)
    kept = permitted & allowed
    for index, half in enumerate(halves):
        half.effective = half.permitted = kept >> (32 * index) & 0xFFFFFFFF
        half.inheritable = 0
    if _libc.capset(ctypes.byref(header), halves) != 0:
        raise _error("capset")


def _bound(allowed: int) -> None:
    number = 0
    while True:
        try:
            present = prctl(_PR_CAPBSET_READ, number)
        except OSError:
            # One past the last that this kernel knows.
            return
        if present and not allowed >> number & 1:
            prctl(_PR_CAPBSET_DROP, number)
        number += 1


def _error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")
