"""By how much a task can pass its memory limit before it is dead. The task itself counts what it touches."""

from __future__ import annotations

import mmap
import struct

import overshoot_programs
import pytest
from overshoot_programs import CHILDREN, MIB

from scaleout_mp import EndReason, Limits, TaskExecutor
from scaleout_mp.sandbox.cgroup import MemoryGroups

LIMIT = 512 * MIB
#: Bytes past the limit, with and without a memory cgroup.
KERNEL_OVERSHOOT, WATCHDOG_OVERSHOOT = MIB, 16 * MIB
ATTEMPTS = 4
PROGRAMS = {
    "private-4KiB": (overshoot_programs.private, False),
    "private-huge": (overshoot_programs.private, True),
    "shared": (overshoot_programs.shared,),
    "memfd": (overshoot_programs.memfd,),
    "private-grandchildren-4KiB": (overshoot_programs.private_in_grandchildren, False),
    "private-grandchildren-huge": (overshoot_programs.private_in_grandchildren, True),
    "shared-grandchildren": (overshoot_programs.shared_among_grandchildren,),
}


def _refuse():
    raise OSError("no cgroups in this test")


@pytest.fixture(scope="module", params=["cgroup", "watchdog"])
def kept_by(request):
    """An executor, and how far past the limit a task may come there."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "watchdog":
            patch.setattr(MemoryGroups, "find", _refuse)
        else:
            try:
                MemoryGroups.find().close()
            except OSError as error:
                pytest.skip(f"no memory cgroup can be made here: {error}")
        with TaskExecutor(echo_output=False, preload=["numpy", "overshoot_programs"]) as executor:
            yield executor, KERNEL_OVERSHOOT if request.param == "cgroup" else WATCHDOG_OVERSHOOT


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_loop_that_touches_memory_as_fast_as_it_can(kept_by, tmp_path, program):
    executor, most = kept_by
    # The watchdog is a thread like any other: that somebody else had the processors says nothing about it.
    overshoots = []
    while not overshoots or (overshoots[-1] > most / MIB and len(overshoots) < ATTEMPTS):
        overshoots.append(_overshoot(executor, tmp_path / "touched", *PROGRAMS[program]) / MIB)
    assert overshoots[-1] <= most / MIB, overshoots


def _overshoot(executor, counters, function, *arguments):
    """Return the bytes that a task had past its limit, by its own count and by its report's."""
    counters.write_bytes(bytes(mmap.PAGESIZE))
    report = executor.submit(function, str(counters), *arguments, limits=Limits(memory=LIMIT)).report(60)
    touched = sum(struct.unpack_from(f"{CHILDREN}Q", counters.read_bytes()))
    assert report.reason is EndReason.MEMORY_LIMIT, report
    assert touched > LIMIT * 0.7, report
    over = report.peak_memory - LIMIT
    if "grandchildren" in function.__name__ and executor._core._groups is not None:
        # The kernel kills them one by one, and what the first had is free for the others: its own count is the truth.
        return over
    # What was begun with the last step of each process need not have been had.
    return max(over, touched - CHILDREN * overshoot_programs.STEP - LIMIT)
