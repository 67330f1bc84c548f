"""The peer: a pool with one process that stays, on one core with it. Imports nothing of ours.

Measures once for each line on standard input: "small" prints the seconds of all requests and the median of one,
"large" the milliseconds until a large array is in the callable.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

REQUESTS = 1000
#: Bytes.
SIZE = 100_000_000


def infer(parameters: dict[str, Any]) -> dict[str, Any]:
    """Answer at once; of an array say when it was there."""
    if "x" in parameters:
        assert parameters["x"].size == SIZE
        return {"at": time.monotonic_ns()}
    return {"digit": parameters["number"] % 10}


def on_one_core() -> None:
    """Keep this program and what it starts on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def measure(what: str, call: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Measure `call`, which has what it needs, once for each line on standard input."""
    import numpy as np

    array = np.ones(SIZE, np.uint8)
    for number in range(100):
        call({"number": number})
    call({"x": array})
    print("ready", flush=True)
    for _ in sys.stdin:
        if what == "small":
            print(*_small(call), flush=True)
        else:
            before = time.monotonic_ns()
            print((call({"x": array})["at"] - before) / 1e6, flush=True)


def _small(call: Callable[[dict[str, Any]], dict[str, Any]]) -> tuple[float, float]:
    single = []
    before = time.perf_counter()
    for number in range(REQUESTS):
        started = time.perf_counter()
        assert call({"number": number}) == {"digit": number % 10}
        single.append(time.perf_counter() - started)
    return time.perf_counter() - before, statistics.median(single)


def main() -> None:
    on_one_core()
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        measure(sys.argv[1], lambda parameters: pool.submit(infer, parameters).result())


if __name__ == "__main__":
    main()
