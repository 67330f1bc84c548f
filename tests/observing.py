"""What tests look at: processes, descriptors, and conditions that come true."""

from __future__ import annotations

import os
import resource
import time

import psutil
import pytest


def is_spare(process: psutil.Process) -> bool:
    """Whether a process was forked ahead by a template, for a task that has not come. It ends with its template."""
    parent = process.parent()
    guardian = None if parent is None else parent.parent()
    # The template is below a guardian that looks like it, and has no tag either.
    if guardian is None or not all("scaleout_mp.worker" in each.cmdline() for each in (parent, guardian)):
        return False
    tag = resource.prlimit(process.pid, resource.RLIMIT_RTTIME)[1]
    return process.cmdline() == parent.cmdline() and tag == resource.getrlimit(resource.RLIMIT_RTTIME)[1]


def children() -> dict[int, str]:
    """Return the descendants of the test process, by pid, without the spares of templates."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        # Who has no child, dead or alive, has no descendants. Most tests have none, and to search /proc takes long.
        return {}
    found = {}
    for child in psutil.Process().children(recursive=True):
        try:
            if child.status() != psutil.STATUS_ZOMBIE and not is_spare(child):
                found[child.pid] = " ".join(child.cmdline())
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found


def wait_until(condition, *, seconds: float = 5.0, what: str = "the condition"):
    """Return the first true value of `condition()`; fail the test when there is none in time."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not hold within {seconds} s")
        time.sleep(0.005)


def open_descriptors() -> dict[int, str]:
    """Return what each descriptor of this process points to."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
    return found


def gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
