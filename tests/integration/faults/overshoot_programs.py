"""Loops that touch memory as fast as they can, and count what they have touched where the test can read it."""

from __future__ import annotations

import ctypes
import mmap
import os
import time

MIB = 1 << 20
STEP = MIB
#: More than twice the limit of the tests, and less than what RLIMIT_DATA refuses at once: where a limit fails, nothing
#: worse happens than a failed test.
MOST = 1296 * MIB
CHILDREN = 3
_MADV_HUGEPAGE, _MADV_NOHUGEPAGE = 14, 15
_libc = ctypes.CDLL(None)
_libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
_libc.memset.restype = ctypes.c_void_p


def _touch(memory, counters, slot, start=0, end=MOST):
    """Write every page; `counters[slot]` is how many bytes were written."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for place in range(start, end, STEP):
        # Before: a step that is begun may be done.
        counters[slot] += STEP
        _libc.memset(address + place, 1, STEP)
    time.sleep(1_000)


def _counters(path):
    with open(path, "r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), mmap.PAGESIZE)).cast("Q")


def private(path, huge):
    memory = mmap.mmap(-1, MOST, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(_MADV_HUGEPAGE if huge else _MADV_NOHUGEPAGE)
    _touch(memory, _counters(path), 0)


def shared(path):
    _touch(mmap.mmap(-1, MOST, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS), _counters(path), 0)


def memfd(path):
    descriptor = os.memfd_create("touched")
    os.ftruncate(descriptor, MOST)
    _touch(mmap.mmap(descriptor, MOST), _counters(path), 0)


def private_in_grandchildren(path, huge):
    counters = _counters(path)
    for slot in range(CHILDREN):
        if os.fork() == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            memory = mmap.mmap(-1, MOST, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(_MADV_HUGEPAGE if huge else _MADV_NOHUGEPAGE)
            _touch(memory, counters, slot)
    time.sleep(1_000)


def shared_among_grandchildren(path):
    """One mapping, of which each grandchild touches a part: shared pages that count once."""
    counters = _counters(path)
    memory = mmap.mmap(-1, MOST, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    part = MOST // CHILDREN
    for slot in range(CHILDREN):
        if os.fork() == 0:
            _touch(memory, counters, slot, slot * part, (slot + 1) * part)
    time.sleep(1_000)
