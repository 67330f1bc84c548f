"""How long a task takes to start, and how many run in a second."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from benchmarks.harness import Row, above, compare, interleaved
from scaleout_mp import TaskExecutor
from scaleout_mp.executor.core import PRELOAD

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from scaleout_mp.config.sandbox import LevelName

BACK_TO_BACK = 100
#: What the executor takes unless somebody says otherwise, on a machine with few processors.
AT_A_TIME = 4


def first_line() -> int:
    """Return the moment of the first line of user code."""
    return time.monotonic_ns()


def with_numpy() -> int:
    import numpy as np

    return int(np.int64(1))


@contextmanager
def peer(module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run a peer as a program of its own, which imports nothing of ours: it measures once for each line it gets."""
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
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


def starts() -> list[Row]:
    """The start of a task, and what each layer of confinement adds to it."""
    rows = [start("auto", 3, ()), start("none", None, ()), start("basic", None, ()), start("strict", None, ())]
    rows.append(start("auto", 4, ("torch",)) if importlib.util.find_spec("torch") else start("auto", 4, (), runs=100))
    return rows


def start(level: LevelName, at_most: float | None, more: Sequence[str], runs: int = 100) -> Row:
    """From `submit` to the first line of user code, against a bare fork and a write to a pipe.

    Both processes that fork have numpy and `more` loaded.
    """
    preload = (*PRELOAD, *more)
    with TaskExecutor(sandbox=level, preload=preload) as executor, peer("benchmarks.forker", *more) as bare:

        def ours() -> float:
            before = time.monotonic_ns()
            return (executor.submit(first_line).result() - before) / 1e6

        def floor() -> float:
            return int(ask(bare)) / 1e6

        interleaved(10, ours, floor)
        mine, theirs = interleaved(runs, ours, floor)
    what = f"task start at level {level}, {' and '.join(('numpy', *more))} loaded"
    if at_most is None:
        return above(what, mine, "bare fork", theirs, unit="ms")
    return compare(what, mine, "bare fork", theirs, unit="ms", at_most=at_most)


def rate(rounds: int = 5) -> Row:
    """A queue of tasks, `AT_A_TIME` at a time on both sides, each in a fresh process with numpy."""
    with (
        TaskExecutor(max_concurrent_tasks=AT_A_TIME) as executor,
        peer("benchmarks.one_task_per_child", str(AT_A_TIME)) as pool,
    ):

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
        f"tasks back to back, {AT_A_TIME} at a time, fresh process each",
        ours_rates,
        "ProcessPoolExecutor(1 task per child, spawn)",
        their_rates,
        unit="tasks/s",
        at_least=30,
    )
