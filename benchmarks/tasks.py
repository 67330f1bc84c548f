"""How long a task takes to start, and how many run in a second."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
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
def forker() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.forker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.stdin.close()


def start(runs: int = 200) -> Row:
    """From `submit` to the first line of user code, against a bare fork and a write to a pipe."""
    with TaskExecutor() as executor, forker() as bare:

        def ours() -> float:
            before = time.monotonic_ns()
            return (executor.submit(first_line).result() - before) / 1e6

        def floor() -> float:
            assert bare.stdin is not None
            assert bare.stdout is not None
            bare.stdin.write("\n")
            bare.stdin.flush()
            return int(bare.stdout.readline()) / 1e6

        interleaved(10, ours, floor)
        mine, theirs = interleaved(runs, ours, floor)
    return compare("task start, fresh process, numpy loaded", mine, "bare fork", theirs, unit="ms", at_most=3)


def rate(rounds: int = 5) -> Row:
    """Tasks one after the other, each in a fresh process with numpy."""
    spawn = multiprocessing.get_context("spawn")
    with (
        TaskExecutor() as executor,
        concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool,
    ):

        def ours() -> float:
            before = time.monotonic()
            for _ in range(BACK_TO_BACK):
                executor.submit(with_numpy).result()
            return BACK_TO_BACK / (time.monotonic() - before)

        def theirs() -> float:
            count = BACK_TO_BACK // 10
            before = time.monotonic()
            for _ in range(count):
                pool.submit(with_numpy).result()
            return count / (time.monotonic() - before)

        ours_rates, their_rates = interleaved(rounds, ours, theirs)
    return compare(
        "tasks back to back, fresh process each",
        ours_rates,
        "ProcessPoolExecutor(1 task per child, spawn)",
        their_rates,
        unit="tasks/s",
        at_least=30,
    )
