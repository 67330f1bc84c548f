"""The launcher of this package: orders to the template process."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import signal
import subprocess
from typing import TYPE_CHECKING, Any, Final, Literal

from scaleout_mp.config import Sandbox
from scaleout_mp.config.machine import wanted_threads
from scaleout_mp.errors import LauncherError, ProtocolViolation
from scaleout_mp.executor import standard
from scaleout_mp.executor.beside import beside
from scaleout_mp.executor.interpreter import Interpreter
from scaleout_mp.executor.launcher import Child, Exited, Started, StartOrder
from scaleout_mp.executor.lookout import LookoutLine
from scaleout_mp.executor.template_start import TemplatePlace, setup_frame, start_process
from scaleout_mp.ipc import frames
from scaleout_mp.ipc.channel import channel_pair, close_all
from scaleout_mp.ipc.frames import MAX_LOADED, Frame, Kind
from scaleout_mp.ipc.loop_channel import SupervisorChannel
from scaleout_mp.sandbox.tree_group import TreeGroup

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from scaleout_mp.ipc.callables import PreparedCallable

logger = logging.getLogger(__name__)

StartMethod = Literal["template", "spawn"]

_CLOSE_SECONDS: Final = 5.0


@dataclasses.dataclass(kw_only=True)
class _Life:
    """One template process, from its start to its death."""

    process: subprocess.Popen[bytes]
    channel: SupervisorChannel
    lookout: LookoutLine
    ready: asyncio.Future[None]
    #: Keys of the callables it holds, oldest first: the template drops them in the same order.
    keys: dict[str, str]
    children: dict[str, Child]
    #: Tasks whose first process is gone, but perhaps not the rest -> done when it is.
    leaving: dict[str, asyncio.Future[int]]
    #: What it is to join, and the one around that; None: there is none, or it could not.
    group: TreeGroup | None = None
    groups: TreeGroup | None = None
    #: What its tasks have on, of `sandbox.layers`.
    layers: tuple[str, ...] = ()
    #: What this machine refuses of the level.
    missing: tuple[str, ...] = ()
    closing: bool = False
    #: Another one has taken its place; it ends with the last of its children.
    retired: bool = False
    #: It hung in user code.
    abandoned: bool = False


class TemplateLauncher:
    """Starts the template when it is first needed, and again after it died."""

    def __init__(
        self,
        *,
        start_method: StartMethod = "template",
        preload: Sequence[str] = (),
        sandbox: Sandbox | None = None,
        threads: int | None = None,
        place: Callable[[], TemplatePlace],
    ) -> None:
        """`threads` is the number that most tasks will want for numerical libraries; others cost a little more.

        `place` is called whenever a template is started.
        """
        self._place = place
        self._sandbox = sandbox or Sandbox(level="auto")
        self._threads = threads or wanted_threads()
        self._start_method = start_method
        self._preload = list(preload)
        self._interpreter = Interpreter()
        self._life: _Life | None = None
        self._retired: list[_Life] = []
        self._said_fallback = False
        #: What a template missed: the next one will miss it as well.
        self._said: set[str] = set()
        self._burials: set[asyncio.Task[object]] = set()

    @property
    def pid(self) -> int | None:
        """The template's pid while it lives."""
        return None if self._life is None else self._life.process.pid

    @property
    def missing_layers(self) -> tuple[str, ...]:
        """What this machine refuses of the level, and why: one sentence each."""
        return () if self._life is None else self._life.missing

    async def open(self) -> None:
        """Start the template and wait until it has preloaded."""
        await asyncio.shield(self._alive().ready)

    async def renew(self, interpreter: Interpreter) -> None:
        """Start another template, which has loaded nothing; the old one ends with the last of its children."""
        self._interpreter = interpreter
        life, self._life = self._life, None
        if life is not None and life.channel.open:
            life.retired = True
            self._retired.append(life)
            self._end_if_empty(life)
        self._said_fallback = False
        await self.open()

    def _end_if_empty(self, life: _Life) -> None:
        if life.retired and not life.children and not life.leaving and not life.closing:
            life.closing = True
            self._retired.remove(life)
            life.channel.close()
            self._keep(_ended(life.process))

    def _keep(self, burial: Coroutine[Any, Any, object]) -> None:
        task = asyncio.get_running_loop().create_task(burial)
        self._burials.add(task)
        task.add_done_callback(self._burials.discard)

    def start(self, order: StartOrder) -> Child:
        """Order a process; a template that died is started anew first."""
        life = self._alive()
        loop = asyncio.get_running_loop()
        child = Child(
            started=loop.create_future(), exited=loop.create_future(), lookout=life.lookout, tree_group=life.groups
        )
        for future in (child.started, child.exited):
            # Whoever waits gets the error; when nobody does, it is not news.
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
        # Before the template counts the child as its own: what cannot be said is never started.
        frame = frames.encode(
            Kind.START,
            order.task_id,
            order.call.key,
            order.confinement.to_fields(),
            descriptors=len(order.descriptors),
        )
        life.children[order.task_id] = child
        send_callable(life.channel, life.keys, order.call)
        life.channel.send(
            frame,
            order.descriptors,
            name=order.task_id,
            on_refused=lambda problem: self._on_not_started(life, order.task_id, f"cannot start a process: {problem}"),
        )
        return child

    # --- The process -----------------------------------------------------------------------------------------------

    def _alive(self) -> _Life:
        if self._life is not None and self._life.channel.open:
            return self._life
        place = self._place()
        interpreter = self._interpreter
        # Before any descriptor for the child: none of them may be one of its standard ones.
        standard.fill_missing()
        ours, theirs = channel_pair()
        lookout, their_lookout = channel_pair()
        group = _group_below(place.group)
        with theirs, their_lookout:
            process = start_process(place, interpreter, channel=theirs, lookout=their_lookout, group=group)
        ready = asyncio.get_running_loop().create_future()
        ready.add_done_callback(lambda done: done.cancelled() or done.exception())
        life: _Life

        def on_frame(frame: Frame) -> None:
            self._on_frame(life, frame)

        def on_closed(violation: ProtocolViolation | None) -> None:
            self._on_closed(life, violation)

        channel = SupervisorChannel(ours, on_frame=on_frame, on_closed=on_closed)
        life = self._life = _Life(
            process=process,
            channel=channel,
            lookout=LookoutLine(lookout),
            ready=ready,
            keys={},
            children={},
            leaving={},
            group=group,
            groups=None if group is None else place.group,
        )
        channel.send(
            setup_frame(
                place,
                interpreter,
                spawns=self._start_method == "spawn",
                preload=self._preload,
                threads=self._threads,
                sandbox=self._sandbox,
            )
        )
        logger.debug("template started", extra={"action": "template_started", "template_pid": process.pid})
        return life

    def _on_frame(self, life: _Life, frame: Frame) -> None:
        close_all(frame.descriptors)
        handlers: dict[Kind, Callable[..., None]] = {
            Kind.READY: self._on_ready,
            Kind.LOADED: self._on_loaded,
            Kind.STARTED: self._on_started,
            Kind.NOT_STARTED: self._on_not_started,
            Kind.EXITED: self._on_exited,
            Kind.CLEARED: self._on_cleared,
        }
        handler = handlers.get(frame.kind)
        if handler is None:
            raise ProtocolViolation(f"the template sent {frame.kind.name}")
        try:
            handler(life, *frame.fields)
        except (TypeError, KeyError) as error:
            raise ProtocolViolation(f"the template sent a {frame.kind.name} that does not fit: {error}") from error

    def _on_ready(
        self, life: _Life, fatal: str | None, problems: list[str], unforkable: str | None, layers: dict[str, list[str]]
    ) -> None:
        life.layers, life.missing = tuple(layers["in_force"]), tuple(layers["missing"])
        if life.group is not None:
            if life.group.members():
                life.layers += (TreeGroup.NAME,)
            else:
                life.groups = None
        if fatal is not None and not life.ready.done():
            life.ready.set_exception(LauncherError(f"no task can run here: {fatal}"))
        for problem in [*life.missing, *problems]:
            if problem not in self._said:
                self._said.add(problem)
                logger.warning("template: %s", problem, extra={"action": "template_problem"})
        self._note_fallback(unforkable)
        if not life.ready.done():
            life.ready.set_result(None)

    def _on_loaded(self, life: _Life, key: str, problem: str | None, unforkable: str | None) -> None:
        if problem is not None:
            name = life.keys.get(key, key)
            # The task that wanted it says so.
            logger.debug("callback %s cannot be loaded: %s", name, problem, extra={"action": "callback_not_loaded"})
        self._note_fallback(unforkable)

    def _note_fallback(self, unforkable: str | None) -> None:
        if unforkable and not self._said_fallback:
            self._said_fallback = True
            logger.warning(
                "the template cannot fork (%s): each task starts a fresh interpreter instead",
                unforkable,
                extra={"action": "template_fallback"},
            )

    def _on_started(self, life: _Life, task_id: str, pid: int, method: str) -> None:
        started = life.children[task_id].started
        if not started.done():
            started.set_result(Started(pid=pid, method=method, layers=life.layers))

    def _on_not_started(self, life: _Life, task_id: str, problem: str) -> None:
        self._fail(life.children.pop(task_id), problem)
        self._end_if_empty(life)

    def _on_exited(self, life: _Life, task_id: str, facts: dict[str, Any]) -> None:
        child = life.children.pop(task_id)
        cleared = None
        if facts["strays"]:
            cleared = life.leaving[task_id] = asyncio.get_running_loop().create_future()
        if not child.exited.done():
            child.exited.set_result(Exited(**facts, cleared=cleared))
        self._end_if_empty(life)

    def _on_cleared(self, life: _Life, task_id: str, killed: int) -> None:
        cleared = life.leaving.pop(task_id)
        if not cleared.done():
            cleared.set_result(killed)
        self._end_if_empty(life)

    @staticmethod
    def _fail(child: Child, problem: str) -> None:
        for future in (child.started, child.exited):
            if not future.done():
                future.set_exception(LauncherError(problem))

    def _on_closed(self, life: _Life, violation: ProtocolViolation | None) -> None:
        life.lookout.close()
        if life is self._life:
            self._life = None
        if not life.closing:
            if life.retired:
                self._retired.remove(life)
            self._keep(self._bury(life, violation))

    async def _bury(self, life: _Life, violation: ProtocolViolation | None) -> None:
        """Wait until nothing of a template is left, and tell whoever waits for it."""
        code = await _ended(life.process)
        how = f"of {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        problem = f"the template process died {how}"
        if life.abandoned:
            problem = "the user's code hangs while it is loaded; the template was ended"
        elif violation is not None:
            problem = f"the template was ended: {violation}"
        if not life.ready.done():
            life.ready.set_exception(LauncherError(f"{problem} while it started"))
        for child in life.children.values():
            self._fail(child, problem)
        life.children.clear()
        # The guardian has seen to it.
        for cleared in life.leaving.values():
            if not cleared.done():
                cleared.set_result(0)
        life.leaving.clear()
        logger.error("%s; the next task starts a new one", problem, extra={"action": "template_died"})

    def doom(self, tag: int) -> None:
        """Say that a task is being killed: who reaps what it leaves is the first to see what forks and leaves."""
        for life in (*self._retired, *filter(None, [self._life])):
            life.channel.send(frames.encode(Kind.DOOM, tag))

    def abandon(self, task_id: str) -> None:
        """Give up a start: end a template that hangs in user code while it loads a callback."""
        lives = [*self._retired, *filter(None, [self._life])]
        life = next((life for life in lives if task_id in life.children), None)
        if life is None or life.children[task_id].started.done():
            return
        if life.channel.withdraw(task_id):
            # The template knows nothing of it.
            return
        life.abandoned = True
        # The guardian sees it, whatever the template is at.
        life.channel.close()

    async def close(self) -> None:
        """End the template; every process that it still has ends with it."""
        lives, self._retired = [*self._retired, *filter(None, [self._life])], []
        for life in lives:
            life.closing = True
            life.channel.close()
            await _ended(life.process)
        while self._burials:
            await asyncio.wait(set(self._burials))


def send_callable(channel: SupervisorChannel, keys: dict[str, str], call: PreparedCallable) -> None:
    """Have the other end load a callable, unless it is among the `keys` that it holds; it drops them as we do."""
    if call.key in keys:
        return
    keys[call.key] = call.name
    while len(keys) > MAX_LOADED:
        del keys[next(iter(keys))]
    channel.send(*call.load_frame())


async def _ended(process: subprocess.Popen[bytes]) -> int:
    """Wait until a template's guardian has ended, after all that is below it; return its exit code."""
    try:
        return await beside(functools.partial(process.wait, _CLOSE_SECONDS))
    except subprocess.TimeoutExpired:
        logger.warning("the template does not end by itself; killing it", extra={"action": "template_killed"})
        process.kill()
        return await beside(process.wait)


def _group_below(group: TreeGroup | None) -> TreeGroup | None:
    # It may be gone, or have become too many: the mark of each tree is there.
    with contextlib.suppress(OSError):
        return None if group is None else group.below()
    return None
