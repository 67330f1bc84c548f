"""The template: a clean interpreter that loads callables once and forks a process for each task that asks for one.

`python -m scaleout_mp.worker` runs it below the guardian. Single-threaded, and silent unless asked. It adopts the
orphans of its tasks, and when the supervisor is gone it ends every process that it ever started and then itself. With
`start_method` "spawn" it loads nothing and starts a fresh interpreter per task.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import os
import select
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

from scaleout_mp.errors import ChannelError
from scaleout_mp.ipc import frames
from scaleout_mp.ipc.callables import SentCallable
from scaleout_mp.ipc.channel import ChildChannel, channel_pair, close_all
from scaleout_mp.ipc.frames import Frame, Kind
from scaleout_mp.ipc.messages import CANNOT_LOAD
from scaleout_mp.sandbox import pools, probe, process, tree
from scaleout_mp.sandbox.confinement import Confinement
from scaleout_mp.sandbox.layers import Layer, Preparation, Rules, prepare
from scaleout_mp.task import loading
from scaleout_mp.worker import failures, resident, task
from scaleout_mp.worker.orphans import Orphans
from scaleout_mp.worker.script import Script
from scaleout_mp.worker.shared_memory import PrivateSharedMemory
from scaleout_mp.worker.spawned import Program, start_interpreter

if TYPE_CHECKING:
    from collections.abc import Callable

#: Children that are reaped before anything else is looked at.
_MOST_AT_ONCE: Final = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class _NotLoaded:
    """Stands for a callable whose loading failed."""

    problem: str
    traceback: str

    @classmethod
    def by(cls, error: BaseException) -> Self:
        problem = f"{failures.class_name(error)}: {failures.describe(error)}"[: failures.MAX_MESSAGE]
        return cls(problem=problem, traceback=failures.format_traceback(error))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Spare:
    """A process that was forked ahead and waits for its task's order."""

    pid: int
    orders: ChildChannel


class Template:
    """State of the template process."""

    def __init__(self, channel: ChildChannel, supervisor: int) -> None:
        self._channel = channel
        self._pid = os.getpid()
        self._supervisor = supervisor
        self._spawn = False
        self._script = Script()
        #: Made here once: a task has no time to lose.
        self._streams = task.line_streams()
        #: Set anew after the user's code was loaded, which may change some: finding them takes longer than a fork.
        self._changed_signals: list[int] = []
        self._preparation = Preparation()
        self._shared_memory = PrivateSharedMemory()
        self._threads = 1
        self._pools = pools.Pools()
        #: As they came, for fresh interpreters.
        self._sent: dict[str, SentCallable] = {}
        self._loaded: dict[str, Callable[..., Any] | _NotLoaded] = {}
        self._spare: _Spare | None = None
        self._orphans = Orphans(lambda task_id, killed: channel.send(frames.encode(Kind.CLEARED, task_id, killed)))
        #: pid of each task's first process -> (task id, tag).
        self._tasks: dict[int, tuple[str, int]] = {}
        #: Tags of tasks that are being killed.
        self._doomed: set[int] = set()
        self._wakeup, self._wakeup_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._take_signals()

    def _take_signals(self) -> None:
        """Hear of children that end. Said anew when user code was loaded: an asyncio loop that ran in it is enough."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wakeup_end, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})

    def serve(self) -> NoReturn:
        """Answer the supervisor until it is gone."""
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        poll.register(self._wakeup, select.POLLIN)
        try:
            while True:
                events = poll.poll(0)
                if self._orphans.due or (not events and self._orphans.expected):
                    self._orphans.look(self._adopted, self._running())
                if not events:
                    if not self._tasks:
                        self._shared_memory.clear()
                    self._keep_spare()
                    events = poll.poll(self._orphans.pause)
                ready = {descriptor for descriptor, _ in events}
                if self._wakeup in ready:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wakeup, 4096)
                    self._reap()
                if self._channel.fileno() in ready:
                    self._answer_all()
        except ChannelError:
            # The guardian ends what is left.
            os._exit(0)

    def _answer_all(self) -> None:
        while (frame := self._channel.receive_ready()) is not None:
            self._answer(frame)

    def _answer(self, frame: Frame) -> None:
        match frame.kind:
            case Kind.SETUP:
                self._set_up(*frame.fields)
            case Kind.LOAD:
                self._load(frame.fields[0], SentCallable.from_frame(frame))
            case Kind.START:
                self._start(frame)
            case Kind.DOOM:
                self._doomed.add(frame.fields[0])
            case _:
                raise ChannelError(f"the supervisor sent {frame.kind.name} to the template")

    # --- Loading -------------------------------------------------------------------------------------------------

    def _set_up(
        self, spawn: bool, preload: list[str], script: dict[str, Any], threads: int, rules: dict[str, Any]
    ) -> None:
        self._spawn = spawn
        self._threads = threads
        self._script = Script(**script).completed()
        self._script.apply_search_path()
        fatal = probe.refusal(lambda: tree.wear_tag(tree.new_tag()))
        # A signal to the supervisor's group, whose leader may be the shell that started it, would reach it as well.
        protected = dict.fromkeys([self._supervisor, os.getpgid(self._supervisor), os.getppid()])
        self._preparation = prepare(Rules.from_fields(rules), list(protected))
        self._shared_memory = PrivateSharedMemory(private=Layer.MOUNTS in self._preparation.in_force)
        # Changes of privileges may undo it.
        process.die_with_parent(os.getppid())
        problems = []
        if not spawn and fatal is None:
            for module in preload:
                try:
                    with self._shared_memory.keeping(), loading():
                        importlib.import_module(module)
                except BaseException as error:  # noqa: BLE001 - a preload is a courtesy; the supervisor logs it
                    problems.append(f"cannot preload {module}: {type(error).__name__}: {error}")
        self._take_signals()
        preparation = self._preparation
        confined = {"in_force": list(preparation.in_force), "missing": list(preparation.missing)}
        self._channel.send(frames.encode(Kind.READY, fatal, problems, self._check_forkable(), confined))

    def _load(self, key: str, sent: SentCallable) -> None:
        # It was forked before this callable was there.
        self._drop_spare()
        self._sent[key] = sent
        while len(self._sent) > frames.MAX_LOADED:
            oldest = next(iter(self._sent))
            self._sent.pop(oldest).close()
            self._loaded.pop(oldest, None)
        problem = None
        if not self._spawn:
            # A library that is loaded now must not start threads.
            pools.name_threads(1)
            try:
                with self._shared_memory.keeping():
                    # Tasks get their models as its arrays; one that had to import it first would start late.
                    importlib.import_module("numpy")
                    self._loaded[key] = sent.load_for_forks()
            except BaseException as error:  # noqa: BLE001 - user code runs while its module is imported
                failure = self._loaded[key] = _NotLoaded.by(error)
                problem = failure.problem
            self._take_signals()
            # Of those that ended while it was loaded, nobody may have been told.
            self._reap()
        self._channel.send(frames.encode(Kind.LOADED, key, problem, self._check_forkable()))

    def _check_forkable(self) -> str | None:
        """Return why this process must not fork from now on; None when it may."""
        if self._spawn:
            return None
        threads = process.thread_count()
        if threads == 1:
            self._pools = pools.Pools()
            self._pools.prepare(self._threads, lambda: probe.refusal(lambda: None), process.thread_count)
            # For tasks, which inherit it.
            pools.name_threads(self._threads)
        if threads > 1:
            # A lock that another thread holds at the fork stays locked in the child for ever.
            self._spawn, reason = True, f"it has {threads} threads after loading the user's code"
        elif _cuda_started():
            self._spawn, reason = True, "CUDA is initialised, which does not survive a fork"
        else:
            # Of an earlier load, what is garbage by now.
            gc.unfreeze()
            # What was loaded goes out of the collector's sight: collections in tasks would copy its pages.
            gc.collect()
            gc.freeze()
            self._changed_signals = process.changed_signals()
            return None
        return reason

    # --- Tasks ---------------------------------------------------------------------------------------------------

    def _start(self, frame: Frame) -> None:
        task_id, key, _ = frame.fields
        try:
            if self._spawn:
                pid = start_interpreter(
                    frame.descriptors,
                    _confinement(frame),
                    Program(script=self._script, callable=self._sent[key], own=self._preparation.own),
                )
            else:
                pid = self._use_spare(frame) or self._fork(lambda: frame)
        except OSError as error:
            self._channel.send(frames.encode(Kind.NOT_STARTED, task_id, f"cannot start a process: {error}"))
            return
        finally:
            close_all(frame.descriptors)
        self._tasks[pid] = (task_id, _confinement(frame).tag)
        self._channel.send(frames.encode(Kind.STARTED, task_id, pid, "spawn" if self._spawn else "template"))

    def _fork(self, order: Callable[[], Frame | None]) -> int:
        """Fork a process for the task that `order`, called in the child, returns; None: there is none."""
        for stream in (sys.stdout, sys.stderr):
            # What the user's imports printed would be printed again by every child. Some programs have no such stream
            # or have closed it, and the disk or pipe behind it may take no more: that is no reason to run no task.
            if stream is not None:
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
        pid = os.fork()
        if pid:
            return pid
        try:
            # Signals first: a handler of the template must not run here.
            process.reset_signals(self._changed_signals)
            process.die_with_parent(self._pid)
            process.may_be_read_by(self._supervisor)
            os.setsid()
            self._preparation.own.put_on_early()
            frame = order()
            if frame is not None:
                confinement = _confinement(frame)
                task.arrange_descriptors(*frame.descriptors)
                task.forget_exit_handlers()
                confinement.apply(self._preparation.own)
                self._pools.apply(confinement.threads)
                serve = resident.run if confinement.resident else task.run
                serve(lambda: self._take(frame.fields[1]), confinement, self._script, self._streams)
        except BaseException:  # noqa: BLE001 - whatever it is, this process must not go on as a template
            with contextlib.suppress(Exception):
                traceback.print_exc()
        finally:
            os._exit(1)

    # --- The spare -----------------------------------------------------------------------------------------------

    def _keep_spare(self) -> None:
        """While there is nothing else to do, fork the process of the next task: it then starts without the wait."""
        if self._spawn or self._spare is not None or not self._loaded:
            return
        ours, theirs = channel_pair()
        orders = ChildChannel(theirs)

        def order() -> Frame | None:
            # Its copies of the template's own ends would hide the template's death.
            ours.close()
            self._channel.close()
            return orders.receive()

        try:
            pid = self._fork(order)
        except OSError:
            # No room for another process now; the next task will say so if that lasts.
            ours.close()
        else:
            self._spare = _Spare(pid=pid, orders=ChildChannel(ours))
        finally:
            orders.close()

    def _use_spare(self, frame: Frame) -> int | None:
        spare, self._spare = self._spare, None
        if spare is None:
            return None
        if tree.is_stopped(spare.pid):
            # Its task would never begin. A child keeps its pid until it is reaped here.
            os.kill(spare.pid, signal.SIGKILL)
            spare.orders.close()
            return None
        try:
            spare.orders.send(
                frames.encode(frame.kind, *frame.fields, descriptors=len(frame.descriptors)),
                frame.descriptors,
                try_for=0,
            )
        except ChannelError:
            # Somebody killed it, or the kernel lets nothing pass now: a fork needs no descriptors sent.
            return None
        finally:
            spare.orders.close()
        return spare.pid

    def _drop_spare(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            # It leaves when its channel is closed.
            spare.orders.close()

    def _take(self, key: str) -> Callable[..., Any]:
        loaded = self._loaded[key]
        if isinstance(loaded, _NotLoaded):
            error = ImportError(f"{CANNOT_LOAD}{loaded.problem}")
            # Where it failed, then; where this is raised says nothing.
            error.add_note(loaded.traceback)
            raise error
        return loaded

    def _reap(self) -> None:
        # Not until there is nobody: some may die as fast as they are reaped.
        for _ in range(_MOST_AT_ONCE):
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                pid = 0
            if pid == 0:
                self._orphans.caught_up()
                return
            self._orphans.note_death()
            # Others are orphans of some task.
            ended = self._tasks.pop(pid, None)
            if ended is None:
                continue
            task_id, tag = ended
            self._doomed.discard(tag)
            strays = self._orphans.behind or bool(self._adopted())
            if strays:
                self._orphans.leave(task_id, tag)
            facts = {
                "code": os.waitstatus_to_exitcode(status),
                "cpu_seconds": usage.ru_utime + usage.ru_stime,
                "max_rss": usage.ru_maxrss * 1024,
                "strays": strays,
            }
            self._channel.send(frames.encode(Kind.EXITED, task_id, facts))
        self._doomed.intersection_update(self._running())
        self._orphans.hold_back(set(self._running()) - self._doomed)
        # Full: it wakes all the same.
        with contextlib.suppress(BlockingIOError):
            os.write(self._wakeup_end, b"\0")

    def _adopted(self) -> list[int]:
        """Return the children that are no task's first process, and not the spare."""
        spare = None if self._spare is None else self._spare.pid
        return [pid for pid in process.children() if pid not in self._tasks and pid != spare]

    def _running(self) -> list[int]:
        """Return the tags of tasks whose first process is there."""
        return [tag for _, tag in self._tasks.values()]


def _confinement(frame: Frame) -> Confinement:
    return Confinement(**frame.fields[2])


def _cuda_started() -> bool:
    torch = sys.modules.get("torch")
    return bool(torch is not None and torch.cuda.is_initialized())
