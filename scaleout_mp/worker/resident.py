"""A worker's process: it serves one task after the other, and what callables keep stays between them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any, Final, NoReturn

from scaleout_mp.errors import ChannelError, ProtocolViolation, StoppedException
from scaleout_mp.ipc import frames
from scaleout_mp.ipc.callables import SentCallable
from scaleout_mp.ipc.frames import MAX_LOADED, Frame, Kind
from scaleout_mp.worker import task
from scaleout_mp.worker.context import ChannelContext, enter
from scaleout_mp.worker.state import LivingState

if TYPE_CHECKING:
    import io
    import logging
    from collections.abc import Callable, Sequence

    from scaleout_mp.ipc.channel import ChildChannel
    from scaleout_mp.sandbox.confinement import Confinement
    from scaleout_mp.worker.script import Script

_flush_c_streams: Final = ctypes.CDLL(None).fflush


class _TaskChannel:
    """The channel as one of several tasks has it: once the task is over, nothing more is sent in its name."""

    def __init__(self, channel: ChildChannel) -> None:
        self._channel = channel
        # Held for each frame: a thread that the task left behind must not get between its end and the next task.
        self._lock = threading.Lock()
        self._over = False

    def send(self, frame: bytes, descriptors: Sequence[int] = ()) -> None:
        with self._lock:
            if self._over:
                raise StoppedException("the task that this thread belongs to is over")
            self._channel.send(frame, descriptors)

    def record(self, kind: Kind, *fields: Any) -> bool:
        with self._lock:
            if self._over:
                raise StoppedException("the task that this thread belongs to is over")
            return self._channel.record(kind, *fields)

    def end(self) -> None:
        with self._lock:
            self._over = True

    def receive_ready(self) -> Frame | None:
        return self._channel.receive_ready()

    def close(self) -> None:
        self._channel.close()


class ResidentContext(ChannelContext):
    """The context of one of several tasks. It stays this process's context until the next one begins."""

    def __init__(self, channel: ChildChannel, task_id: str, *, progress_every: float, state: dict[Any, Any]) -> None:
        self._own = _TaskChannel(channel)
        super().__init__(self._own, task_id, progress_every=progress_every, state=LivingState(state))

    def begin(self) -> None:
        """Say that the callable begins: what a process dies of before that is not this task's doing."""
        self._own.send(frames.encode(Kind.PROGRESS))

    def end(self) -> None:
        """Have all output on its way, and refuse whatever is logged after."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        _flush_c_streams(None)
        self._own.end()

    def log_line(self, record: logging.LogRecord, message: str) -> None:
        """Send a record of the logging module; what comes after the end is nobody's."""
        with contextlib.suppress(StoppedException):
            super().log_line(record, message)


class _Callables:
    """What this process has loaded, by key; the supervisor drops the same ones in the same order."""

    def __init__(self, first: Callable[[], Callable[..., Any]], script: Script) -> None:
        """`first` gives the callable that the process was started for, which came another way than the others."""
        self._first = first
        self._script = script
        #: None: it was loaded.
        self._loaders: dict[str, Callable[[], Callable[..., Any]] | None] = {}
        self._loaded: dict[str, Callable[..., Any]] = {}
        #: What tasks hand on, by the name that they have for it.
        self.states: dict[str, dict[Any, Any]] = {}

    def keep(self, key: str, loader: Callable[[], Callable[..., Any]]) -> None:
        self._loaders[key] = loader
        while len(self._loaders) > MAX_LOADED:
            oldest = next(iter(self._loaders))
            del self._loaders[oldest]
            self._loaded.pop(oldest, None)

    def load(self, key: str) -> Callable[..., Any]:
        """Return the callable, the same object each time. Raises whatever its loading raises."""
        if not self._loaders:
            self.keep(key, self._first)
        loader = self._loaders[key]
        if loader is not None:
            before = vars(sys.modules["__main__"]) if self._loaded else {}
            loaded = self._loaded[key] = loader()
            self._loaders[key] = None
            self._script.apply_main(loaded)
            # Callables of one script find each other's functions there, as in the script itself.
            main = vars(sys.modules["__main__"])
            main.update({name: value for name, value in before.items() if name not in main})
        return self._loaded[key]


def run(
    load: Callable[[], Callable[..., Any]],
    confinement: Confinement,
    script: Script,
    streams: tuple[io.TextIOWrapper[Any], io.TextIOWrapper[Any]],
) -> NoReturn:
    """Serve the tasks that come in the channel until the supervisor closes it; never returns.

    `load` gives the first task's callable. `streams` are those of `task.line_streams`.
    """
    channel = task.open_channel()
    code = 1
    try:
        task.prepare_interpreter(streams)
        code = _serve(channel, _Callables(load, script), confinement)
    except ChannelError:
        # The supervisor is gone. Nobody is left to tell.
        code = 1
    except BaseException:  # noqa: BLE001 - a fault of this package; the end of stderr is in the report
        traceback.print_exc()
    finally:
        task.leave(code)


def _serve(channel: ChildChannel, callables: _Callables, confinement: Confinement) -> int:
    own = os.getpid()
    while (frame := channel.receive()) is not None:
        match frame.kind:
            case Kind.LOAD:
                callables.keep(frame.fields[0], SentCallable.from_frame(frame).load)
            case Kind.TASK:
                code = _serve_task(channel, callables, confinement, frame)
                if os.getpid() != own:
                    return code
            case Kind.ABORT:
                # Of a task that ended by itself while this was on its way.
                pass
            case _:
                raise ProtocolViolation(f"the supervisor sent {frame.kind.name} to a worker")
    return 0


def _serve_task(channel: ChildChannel, callables: _Callables, confinement: Confinement, frame: Frame) -> int:
    task_id, packed, key, progress_every, state = frame.fields
    context = ResidentContext(
        channel, task_id, progress_every=progress_every, state=callables.states.setdefault(state, {})
    )
    enter(context, log_level=confinement.log_level)
    call = task.Call(channel, context, lambda: callables.load(key), lambda _: None)
    return task.run_callable(call, packed, frame.descriptors)
