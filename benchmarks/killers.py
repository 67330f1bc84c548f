"""How others end the same task: a program of its own for each, which does it once for each line on standard input.

Run as `python -m benchmarks.killers NAME`; a line in says whether the task ignores SIGTERM ("deaf" or "docile"), a line
out has the milliseconds until it was gone and how many of its processes outlived it.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time

from benchmarks.hoarder import Victims, hoard, listen, place_to_tell, warm

#: Seconds that a task with a limit gets: more than it takes to touch its memory and fork.
LIMIT = 4.0


def bare(told: str, *, deaf: bool) -> tuple[float, int]:
    """The floor: a forked process in a group of its own, SIGKILL to the group, and pidfds to see the end."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        hoard(told, ignore_term=deaf)
    victims = Victims(listen(told)["pids"])
    before = time.monotonic()
    os.killpg(pid, signal.SIGKILL)
    gone = victims.all_gone() - before
    os.waitpid(pid, 0)
    return gone, victims.bury()


def pebble(told: str, *, deaf: bool) -> tuple[float, int]:
    """The time limit of pebble: SIGTERM, then SIGKILL to the worker."""
    from pebble import ProcessPool

    with ProcessPool(max_workers=1, context=multiprocessing.get_context("spawn")) as pool:
        pool.schedule(warm).result()
        future = pool.schedule(hoard, args=(told,), kwargs={"ignore_term": deaf}, timeout=LIMIT)
        news = listen(told)
        victims = Victims(news["pids"])
        gone = victims.first_gone() - news["started"] - LIMIT
        with contextlib.suppress(TimeoutError):
            future.result()
        pool.stop()
    return gone, victims.bury()


def billiard(told: str, *, deaf: bool) -> tuple[float, int]:
    """The hard time limit of billiard, celery's pool: SIGKILL to the worker."""
    import billiard as package
    from billiard.pool import Pool

    pool = Pool(1, enable_timeouts=True, context=package.get_context("spawn"))
    pool.apply(warm)
    result = pool.apply_async(hoard, (told,), {"ignore_term": deaf}, timeout=LIMIT)
    news = listen(told)
    victims = Victims(news["pids"])
    gone = victims.first_gone() - news["started"] - LIMIT
    result.wait()
    pool.terminate()
    pool.join()
    return gone, victims.bury()


def loky(told: str, *, deaf: bool) -> tuple[float, int]:
    """The only way in loky to end a task that runs: the whole executor goes."""
    from loky import ProcessPoolExecutor

    executor = ProcessPoolExecutor(max_workers=1)
    executor.submit(hoard, told, ignore_term=deaf)
    victims = Victims(listen(told)["pids"])
    before = time.monotonic()
    ending = threading.Thread(target=executor.shutdown, kwargs={"kill_workers": True})
    ending.start()
    gone = victims.first_gone() - before
    ending.join()
    return gone, victims.bury()


WAYS = {way.__name__: way for way in (bare, pebble, billiard, loky)}


def main() -> None:
    way = WAYS[sys.argv[1]]
    print("ready", flush=True)
    for line in sys.stdin:
        with place_to_tell() as told:
            gone, survivors = way(told, deaf=line.strip() == "deaf")
        print(json.dumps([gone * 1e3, survivors]), flush=True)


if __name__ == "__main__":
    main()
