"""The peer: a pool whose child lives for one task and imports numpy. Twenty tasks for each line on standard input.

The command line says how many at a time.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import sys
import time

TASKS = 20


def with_numpy() -> int:
    import numpy as np

    return int(np.int64(1))


def main() -> None:
    spawn = multiprocessing.get_context("spawn")
    workers = int(sys.argv[1])
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn, max_tasks_per_child=1) as pool:
        pool.submit(with_numpy).result()
        print("ready", flush=True)
        for _ in sys.stdin:
            before = time.monotonic()
            for future in [pool.submit(with_numpy) for _ in range(TASKS)]:
                future.result()
            print(TASKS / (time.monotonic() - before), flush=True)


if __name__ == "__main__":
    main()
