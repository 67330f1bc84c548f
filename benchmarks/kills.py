"""How long it takes until a task is gone with all that it started, beside what other packages offer for it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from benchmarks.harness import Row, beside, compare, interleaved
from benchmarks.hoarder import Victims, hoard, listen, place_to_tell
from benchmarks.killers import LIMIT
from benchmarks.tasks import peer
from scaleout_mp import EndReason, Limits, TaskExecutor, TaskKilled

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

_WHAT = "1 GB task and its two children, gone after"


class _Ours:
    """Our executor at work on the same task."""

    def __init__(self, executor: TaskExecutor) -> None:
        self._executor = executor

    def order(self) -> float:
        """Kill on order: milliseconds until hoarder and children have ended."""
        with place_to_tell() as told:
            task = self._executor.submit(hoard, told, ignore_term=False, limits=Limits(abort_grace=0))
            victims = Victims(listen(told)["pids"])
            before = time.monotonic()
            task.abort()
            return self._end(task.result, before, EndReason.INTERRUPTED_BY_CLIENT, victims)

    def limit(self, *, deaf: bool) -> float:
        """Kill for a limit: the same, from the moment when it is reached."""
        with place_to_tell() as told:
            limits = Limits(abort_grace=0, wall_time=LIMIT)
            ordered = time.monotonic()
            task = self._executor.submit(hoard, told, ignore_term=deaf, limits=limits)
            victims = Victims(listen(told)["pids"])
            return self._end(task.result, ordered + LIMIT, EndReason.WALL_TIME, victims)

    def _end(self, result: Callable[[], object], before: float, reason: EndReason, victims: Victims) -> float:
        gone = victims.all_gone() - before
        try:
            result()
        except TaskKilled as killed:
            report = killed.report
        assert report.reason is reason, report
        return gone * 1e3


class _Theirs:
    """A program of another package's; keeps how many processes outlived it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.survivors: list[int] = []

    def end(self, how: str) -> float:
        """Have it end one task, and return how many milliseconds that took."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(how + "\n")
        self._process.stdin.flush()
        milliseconds, survivors = json.loads(self._process.stdout.readline())
        self.survivors.append(survivors)
        return float(milliseconds)


def kills(runs: int = 5, timeouts: int = 3) -> list[Row]:
    """The rows; concurrent.futures has no way to end a task that runs."""
    with (
        TaskExecutor() as executor,
        peer("benchmarks.killers", "bare") as bare,
        peer("benchmarks.killers", "pebble") as pebble,
        peer("benchmarks.killers", "billiard") as billiard,
        peer("benchmarks.killers", "loky") as loky,
    ):
        ours = _Ours(executor)
        others = {
            name: _Theirs(process)
            for name, process in {"bare": bare, "pebble": pebble, "billiard": billiard, "loky": loky}.items()
        }
        interleaved(1, ours.order, lambda: others["bare"].end("docile"))
        order, floor = interleaved(runs, ours.order, lambda: others["bare"].end("docile"))
        limit, limit_deaf, pebble_limit, pebble_deaf, billiard_limit, loky_end = interleaved(
            timeouts,
            lambda: ours.limit(deaf=False),
            lambda: ours.limit(deaf=True),
            lambda: others["pebble"].end("docile"),
            lambda: others["pebble"].end("deaf"),
            lambda: others["billiard"].end("docile"),
            lambda: others["loky"].end("docile"),
        )

    def named(name: str) -> str:
        left = max(others[name].survivors)
        return f"{name}, leaves {left} processes" if left else name

    return [
        compare(f"{_WHAT} an order", order, "pidfd + killpg", floor, unit="ms", at_most=1.3),
        compare(f"{_WHAT} a time limit", limit, named("pebble"), pebble_limit, unit="ms", at_least=1),
        compare(f"{_WHAT} one, SIGTERM ignored", limit_deaf, named("pebble"), pebble_deaf, unit="ms", at_least=30),
        beside(f"{_WHAT} a time limit", limit, billiard_limit, peer=named("billiard"), unit="ms"),
        beside(f"{_WHAT} an order", order, loky_end, peer=f"{named('loky')}, all its tasks", unit="ms"),
    ]
