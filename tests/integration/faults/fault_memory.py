"""Memory: every way to have more of it than the limit, and one to have not so much as it seems."""

from __future__ import annotations

import ctypes
import mmap
import os
import time

import numpy as np
from fault_catalogue import fault

from scaleout_mp import EndReason, Limits

MEMORY, COMPLETED, FAILED = EndReason.MEMORY_LIMIT, EndReason.COMPLETED, EndReason.FAILED
MIB = 1 << 20
M96 = Limits(memory="96MiB", abort_grace=0.3)
#: More than the limit, and not enough to hurt a machine where it fails.
MUCH = 400 * MIB


def _touch(memory):
    for place in range(0, len(memory), mmap.PAGESIZE):
        memory[place] = 1
    time.sleep(1_000)


def _needs_memory_group(stage):
    if stage.executor._core._groups is not None:
        return None
    return "no memory cgroup can be made here, and without one a memfd that nobody maps is not seen: docs/limits.md"


@fault(MEMORY, limits=M96, says="its memory limit of 96.0 MiB")
def touch_as_fast_as_possible(_):
    held = [np.ones(1 << 17) for _ in range(MUCH >> 20)]
    time.sleep(1_000)
    del held


@fault(MEMORY, limits=M96)
def many_small_objects(_):
    held = [bytes(1000) for _ in range(MUCH // 1000)]
    time.sleep(1_000)
    del held


@fault(MEMORY, limits=M96)
def allocate_in_c(_):
    libc = ctypes.CDLL(None)
    libc.malloc.restype = libc.memset.restype = ctypes.c_void_p
    for _ in range(MUCH >> 20):
        libc.memset(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(MIB))), 1, ctypes.c_size_t(MIB))
    time.sleep(1_000)


@fault(MEMORY, limits=M96)
def shared_mapping(_):
    _touch(mmap.mmap(-1, MUCH, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS))


@fault(MEMORY, limits=M96)
def mapped_memfd(_):
    descriptor = os.memfd_create("much")
    os.ftruncate(descriptor, MUCH)
    _touch(mmap.mmap(descriptor, MUCH))


@fault(MEMORY, limits=M96, needs=_needs_memory_group)
def memfd_that_nobody_maps(_):
    descriptor = os.memfd_create("much")
    for _ in range(MUCH >> 20):
        os.write(descriptor, bytes(MIB))
    time.sleep(1_000)


@fault(MEMORY, limits=M96)
def file_in_shared_memory(place):
    descriptor = os.open(f"/dev/shm/{place.mark}", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    os.unlink(f"/dev/shm/{place.mark}")
    os.ftruncate(descriptor, MUCH)
    _touch(mmap.mmap(descriptor, MUCH))


@fault(MEMORY, limits=M96)
def memory_of_children(_):
    for _ in range(3):
        if os.fork() == 0:
            held = np.ones(6 * MIB)
            time.sleep(1_000)
            del held
    time.sleep(1_000)


@fault(MEMORY, limits=M96)
def memory_of_a_daemon(_):
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        _touch(mmap.mmap(-1, MUCH, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    time.sleep(1_000)


@fault(MEMORY, limits=M96)
def copies_on_write(_):
    held = np.ones(6 * MIB)
    for _ in range(4):
        if os.fork() == 0:
            held += 1
            time.sleep(1_000)
    time.sleep(1_000)


@fault(COMPLETED, limits=M96, returns="done")
def pages_that_forks_share(_):
    """48 MiB in each of five processes, which are the same 48 MiB."""
    held = np.ones(6 * MIB)
    children = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            time.sleep(0.3)
            os._exit(int(held[0]) - 1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    return "done"


@fault(MEMORY, limits=M96, says="ran out of memory", error="MemoryError")
def one_huge_allocation(_):
    np.empty(1 << 46, np.uint8)


@fault(MEMORY, limits=M96, says="ran out of memory", error="OSError")
def one_huge_mapping(_):
    mmap.mmap(-1, 1 << 46, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


@fault(MEMORY, limits=M96, says="ran out of memory", error="RuntimeError")
def the_words_of_torch(_):
    raise RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 70368744177664 bytes. Error code 12 (Cannot allocate memory)"
    )


@fault(FAILED, error="MemoryError")
def a_memory_error_without_a_limit(_):
    np.empty(1 << 46, np.uint8)


@fault(MEMORY, limits=M96)
def swallow_every_memory_error(_):
    held = []
    while True:
        try:
            held.append(np.ones(MIB))
            np.empty(1 << 46, np.uint8)
        except MemoryError:
            continue


@fault(MEMORY, limits=M96)
def a_result_past_the_limit(_):
    return np.ones(MUCH // 8)
