"""How long a task takes to start, and how many run in a second."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from benchmarks.harness import Row, compare, interleaved
from scaleout_mp import TaskExecutor

if TYPE_CHECKING:
    from collections.abc import Iterator

BACK_TO_BACK = 100


def first_line() -> int:
    """Return the moment of the first line of user code."""
    return time.monotonic_ns()


def with_numpy() -> int:
    import numpy as np

    return int(np.int64(1))


@contextmanager
def peer(module: str) -> Iterator[subprocess.Popen[str]]:
    """Run a peer as a program of its own, which imports nothing of ours: it measures once for each line it gets."""
    with subprocess.Popen(
        [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.stdin.close()


def ask(process: subprocess.Popen[str]) -> str:
    """Have a peer measure once."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline()


def start(runs: int = 200) -> Row:
    """From `submit` to the first line of user code, against a bare fork and a write to a pipe."""
    with TaskExecutor() as executor, peer("benchmarks.forker") as bare:

        def ours() -> float:
            before = time.monotonic_ns()
            return (executor.submit(first_line).result() - before) / 1e6

        def floor() -> float:
            return int(ask(bare)) / 1e6

        interleaved(10, ours, floor)
        mine, theirs = interleaved(runs, ours, floor)
    return compare("task start, fresh process, numpy loaded", mine, "bare fork", theirs, unit="ms", at_most=3)


def rate(rounds: int = 5) -> Row:
    """A queue of tasks, as many at a time as there are processors, each in a fresh process with numpy."""
    with TaskExecutor(max_concurrent_tasks=os.cpu_count()) as executor, peer("benchmarks.one_task_per_child") as pool:

        def ours() -> float:
            before = time.monotonic()
            for task in [executor.submit(with_numpy) for _ in range(BACK_TO_BACK)]:
                task.result()
            return BACK_TO_BACK / (time.monotonic() - before)

        def theirs() -> float:
            return float(ask(pool))

        ours()
        ours_rates, their_rates = interleaved(rounds, ours, theirs)
    return compare(
        "tasks back to back, fresh process each",
        ours_rates,
        "ProcessPoolExecutor(1 task per child, spawn)",
        their_rates,
        unit="tasks/s",
        at_least=30,
    )
