"""A supervisor on which one fault after another is performed, and what must be true of it after each.

Everything is looked at from outside of the package: /proc, the clock, the log.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import logging
import os
import resource
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import fault_catalogue
from fault_catalogue import ANYTHING, Fault, Place, perform
from fault_flood import LOGGER
from observing import children, open_descriptors

from scaleout_mp.sandbox import tree

MIB = 1 << 20
#: Names of the levels, with commas, at which the faults are performed; `make faults` names all of them.
LEVELS_VARIABLE = "SCALEOUT_MP_FAULT_LEVELS"
LIMIT_KINDS = sorted({value for name, value in vars(resource).items() if name.startswith("RLIMIT_")})
#: Bytes that the supervisor may have more after a fault than before.
MOST_GROWTH = 16 * MIB
#: Seconds from the report until nothing of the task may be left.
UNTIL_CLEAN = 2.0
#: Seconds between two ticks on the executor's loop, and by which one may be late.
TICK, MOST_LATE = 0.01, 0.4
#: Seconds that a task may hang before the suite calls it lost.
LOST = 30.0
#: A task that does nothing may take so many times what it took before the faults, and seconds on top of it.
SLOWER, SLOWER_BY = 3.0, 0.01


def levels(default):
    """Return the levels to perform faults at: the variable's, or `default`."""
    named = os.environ.get(LEVELS_VARIABLE)
    return named.split(",") if named else list(default)


def benign(number):
    """Return what any healthy task can."""
    return number + 1


def noisy():
    """Log a line, which has the supervisor start the thread that passes it on."""
    logging.getLogger(LOGGER).error("warm")


def privileges():
    """Return whether a system call filter is in force, as the kernel says."""
    with open("/proc/self/status") as file:
        fields = dict(line.rstrip("\n").split(":", 1) for line in file)
    return fields["Seccomp"].strip() == "2"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standing:
    """What a supervisor has and must keep."""

    descriptors: Counter[str]
    threads: Counter[str]
    limits: dict[int, tuple[int, int]]
    environment: dict[str, str]
    folder: str
    umask: str
    blocked: frozenset[int]
    handlers: dict[int, object]
    processors: frozenset[int]
    nice: int
    oom_score: str
    temporary: frozenset[str]
    shared_memory: frozenset[str]
    processes: frozenset[int]

    @classmethod
    def now(cls, mark: str) -> Standing:
        """Look. Entries of /dev/shm count when they carry the mark, or belong to a user who does nothing else."""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return cls(
            descriptors=Counter(open_descriptors().values()),
            # A pool of two, whose threads come when they are needed.
            threads=Counter(
                thread.name for thread in threading.enumerate() if not thread.name.startswith("scaleout-scratch_")
            ),
            limits={kind: resource.getrlimit(kind) for kind in LIMIT_KINDS},
            environment=dict(os.environ),
            folder=os.getcwd(),
            umask=status["Umask"],
            blocked=frozenset(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
            handlers={number: signal.getsignal(number) for number in signal.valid_signals()},
            processors=frozenset(os.sched_getaffinity(0)),
            nice=os.getpriority(os.PRIO_PROCESS, 0),
            oom_score=Path("/proc/self/oom_score_adj").read_text(),
            temporary=frozenset(os.listdir(tempfile.gettempdir())),
            shared_memory=frozenset(_shared_memory(mark)),
            processes=frozenset(children()),
        )

    def differences(self, before: Standing) -> dict[str, object]:
        """Return what is not as it was; of descriptors, threads and entries only what came."""
        found = {}
        for field in dataclasses.fields(self):
            old, new = getattr(before, field.name), getattr(self, field.name)
            if isinstance(new, Counter | frozenset):
                came = new - old
                if came and field.name != "processes":
                    found[field.name] = came
                if field.name == "processes" and len(new) > len(old):
                    found[field.name] = children()
            elif new != old:
                found[field.name] = (old, new)
        return found


def _shared_memory(mark: str) -> list[str]:
    found = []
    for entry in os.scandir("/dev/shm"):
        with contextlib.suppress(FileNotFoundError):
            own = entry.stat(follow_symlinks=False).st_uid == os.getuid() != 0
            if own or mark in entry.name:
                found.append(entry.name)
    return found


def marked(mark: str) -> list[str]:
    """Return the command lines of living processes that carry the mark in their environment or their mappings."""
    found = []
    wanted = mark.encode()
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            # A zombie has neither.
            for place in ("environ", "maps"):
                if wanted in Path(f"/proc/{name}/{place}").read_bytes():
                    command = Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ")
                    found.append(f"{name}: {command.decode(errors='replace')}")
                    break
    return found


def _remove(folder: str) -> None:
    """Remove a fault's folder, which it may have closed to its own user, or removed itself."""
    if os.path.lexists(folder):
        subprocess.run(["chmod", "-R", "u+rwX", folder], check=True)
        subprocess.run(["rm", "-rf", folder], check=True)


class Ticker:
    """Measures how late a timer on the executor's loop is; time in which others had the processor does not count."""

    def __init__(self, loop, thread_id: int) -> None:
        self._loop = loop
        self._schedstat = f"/proc/self/task/{thread_id}/schedstat"
        self._running = False
        self.latest = 0.0

    def _waited(self) -> float:
        """Seconds that the thread has waited for a processor; 0 where the kernel does not count them."""
        with contextlib.suppress(OSError):
            return int(Path(self._schedstat).read_text().split()[1]) / 1e9
        return 0.0

    def __enter__(self):
        self.latest, self._running = 0.0, True
        self._loop.call_soon_threadsafe(self._begin)
        return self

    def _begin(self) -> None:
        self._due, self._before = self._loop.time() + TICK, self._waited()
        self._loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        now, waited = self._loop.time(), self._waited()
        self.latest = max(self.latest, now - self._due - (waited - self._before))
        if self._running:
            self._due, self._before = now + TICK, waited
            self._loop.call_at(self._due, self._tick)

    def __exit__(self, *_):
        self._running = False


def _pace() -> float:
    """Return the seconds that this machine takes now for a process that has nothing to do with the package."""
    started = time.perf_counter()
    subprocess.run(["true"], check=True)
    return time.perf_counter() - started


class Stage:
    """One supervisor at one level."""

    def __init__(self, level: str, executor, folder: Path) -> None:
        self.level = level
        self.executor = executor
        self._folder = folder
        self._loop = executor._thread.loop
        self._unhandled: list[dict] = []
        self._loop.call_soon_threadsafe(self._loop.set_exception_handler, lambda _, told: self._unhandled.append(told))
        self._ends = _Ends()
        logging.Logger.manager.loggerDict[LOGGER] = _DeafLogger(LOGGER)
        self._numbers = itertools.count()
        self._last_tag = 0
        self._new_tag, tree.new_tag = tree.new_tag, self._note_tag
        self._warm_up()
        self.ticker = Ticker(self._loop, executor._thread.native_id)
        self.filtered = executor.submit(privileges).result(LOST)
        durations = sorted(self.benign() for _ in range(15))
        self.usual, self._pace = durations[len(durations) // 2], _pace()
        self.rss = self._rss()
        self.growth = {}

    def _warm_up(self) -> None:
        """Have all threads that a busy supervisor has: those for blocking work come one by one otherwise."""
        barrier = threading.Barrier(min(32, (os.cpu_count() or 1) + 4))
        for _ in range(barrier.parties):
            self._loop.call_soon_threadsafe(self._loop.run_in_executor, None, barrier.wait, LOST)
        self.executor.submit(noisy).result(LOST)
        for task in [self.executor.submit(benign, 1) for _ in range(20)]:
            assert task.result(LOST) == 2

    def _note_tag(self) -> int:
        self._last_tag = self._new_tag()
        return self._last_tag

    def benign(self) -> float:
        """Run a task that does nothing; return the seconds that it took."""
        number = next(self._numbers)
        started = time.perf_counter()
        assert self.executor.submit(benign, number).result(LOST) == number + 1
        return time.perf_counter() - started

    @staticmethod
    def _rss(field: str = "VmRSS") -> int:
        gc.collect()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status[field].split()[0]) * 1024

    def perform(self, fault: Fault) -> None:
        """Have a fault happen, and look at everything that it must leave alone."""
        mark = f"fault-{os.getpid()}-{next(self._numbers)}"
        # A template that a fault has cost is there again.
        self.benign()
        guardian = self.executor._core._launcher.pid
        (template,) = Path(f"/proc/{guardian}/task/{guardian}/children").read_text().split()
        place = Place(
            supervisor=os.getpid(),
            guardian=guardian,
            template=int(template),
            level=self.level,
            mark=mark,
            folder=str(self._folder / mark),
            supervisor_folder=os.getcwd(),
        )
        os.mkdir(place.folder)
        before, rss = Standing.now(mark), self._rss()
        # Has the peak start again from here; proc(5).
        Path("/proc/self/clear_refs").write_text("5")
        with self.ticker:
            task = self.executor.submit(perform, place, fault.program.__module__, fault.name, limits=fault.limits)
            if fault.drive is not None:
                fault.drive(task, place)
            try:
                report = task.report(LOST)
            except TimeoutError:
                task.abort("lost")
                raise
        reported = time.monotonic()
        try:
            check_report(fault, report, place)
            if fault.returns is not ANYTHING:
                returned = task.result()
                assert returned == fault.returns, returned
        finally:
            del task
            _remove(place.folder)
        peak = self._rss("VmHWM") - rss
        self._check_leftovers(mark, before, reported)
        assert self._ends.of(report.task_id) == [report.reason.value]
        assert self._unhandled == []
        assert self.ticker.latest < MOST_LATE, f"the loop was {self.ticker.latest:.3f} s late"
        assert peak < fault.peak, f"the supervisor took {peak / MIB:.1f} MiB more for a while"
        self._check_usual_speed()
        grown = self._rss() - rss
        self.growth[fault.name] = grown // MIB
        assert grown < MOST_GROWTH, f"the supervisor has {grown / MIB:.1f} MiB more than before"

    def _check_leftovers(self, mark: str, before: Standing, reported: float) -> None:
        while True:
            left = Standing.now(mark).differences(before)
            if processes := marked(mark):
                left["marked processes"] = processes
            if processes := tree.tagged(self._last_tag):
                left["tagged processes"] = processes
            if groups := self._groups_left():
                left["cgroups"] = groups
            if folders := [
                name for name in os.listdir(self.executor._core._scratch.folders.path) if name != "template"
            ]:
                left["scratch folders"] = folders
            if not left:
                return
            assert time.monotonic() < reported + UNTIL_CLEAN, f"left {UNTIL_CLEAN} s after the report: {left}"
            time.sleep(0.01)

    def _groups_left(self) -> list[str]:
        groups = self.executor._core._groups
        found = [] if groups is None else [entry.name for entry in os.scandir(groups.base) if entry.is_dir()]
        # Of version 2, the template's own is beside those of tasks.
        return [name for name in found if not name.startswith("template-")]

    def _check_usual_speed(self) -> None:
        """Run tasks until one is as fast as they were, which is the first one unless the machine is busy."""
        took = []
        for _ in range(30):
            took.append(self.benign())
            # The machine may have become slower for everybody, as when other tests run beside these.
            if min(took) <= SLOWER * self.usual * max(1.0, _pace() / self._pace) + SLOWER_BY:
                return
        raise AssertionError(f"a task takes {min(took):.3f} s; it took {self.usual:.3f} s before")

    def close(self) -> None:
        """Check what must be true after all of the faults together."""
        tree.new_tag = self._new_tag
        self._ends.close()
        grown = self._rss() - self.rss
        assert grown < 2 * MOST_GROWTH, f"after all faults the supervisor has {grown / MIB:.1f} MiB more: {self.growth}"


class _DeafLogger(logging.Logger):
    """Takes records and does nothing with them: pytest would keep each one."""

    def handle(self, record: logging.LogRecord) -> None:
        """Do nothing."""


class _Ends(logging.Filter):
    """Counts terminal reports where they are logged, and keeps them from pytest."""

    def __init__(self) -> None:
        super().__init__()
        self._reasons: dict[str, list[str]] = {}
        self._logger = logging.getLogger("scaleout_mp.executor.execution")
        self._level = self._logger.level
        self._logger.setLevel(logging.DEBUG)
        self._logger.addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        if getattr(record, "action", "") != "task_ended":
            return record.levelno > logging.DEBUG
        self._reasons.setdefault(record.task_id, []).append(record.reason)
        return False

    def of(self, task_id: str) -> list[str]:
        """Return the reasons of all ends of a task; forget the others."""
        found = self._reasons.get(task_id, [])
        self._reasons.clear()
        return found

    def close(self) -> None:
        self._logger.removeFilter(self)
        self._logger.setLevel(self._level)


def check_report(fault: Fault, report, place: Place) -> None:
    """Check that a report says what happened."""
    assert report.reason is fault.ends, report
    if fault.signal is not None:
        assert report.signal == fault.signal, report
    if fault.error is not None:
        assert report.error_type == fault.error, report
    for part, text in (
        (fault.says, report.message),
        (fault.trace, report.traceback),
        (fault.stacks, report.stacks),
        (fault.note, "\n".join(report.notes)),
    ):
        assert not part or (text is not None and part in text), (part, report)
    if not report.completed:
        assert f"why-was-my-task-killed.md#{report.reason.value.replace('_', '-')}" in str(report.to_error())
    if fault.check is not None:
        fault.check(report, place)


def modules_to_preload() -> list[str]:
    """Return what the template imports ahead, so that faults start as fast as other tasks."""
    return ["numpy", "scaleout_mp.model", *fault_catalogue.MODULES]
