"""A task's process: confine it, run one callable, send what came of it, leave."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import faulthandler
import fcntl
import logging
import os
import socket
import sys
import threading
import traceback
import weakref
from typing import TYPE_CHECKING, Any, Final, NoReturn

from scaleout_mp.errors import ChannelError, ProtocolViolation
from scaleout_mp.ipc import arguments, frames, values
from scaleout_mp.ipc.channel import ChildChannel
from scaleout_mp.ipc.frames import Frame, Kind
from scaleout_mp.sandbox import process
from scaleout_mp.worker import failures
from scaleout_mp.worker.context import ChannelContext, enter
from scaleout_mp.worker.state import KeptState

if TYPE_CHECKING:
    import io
    from collections.abc import Callable
    from types import FrameType

    from scaleout_mp.sandbox.confinement import Confinement
    from scaleout_mp.worker.script import Script
    from scaleout_mp.worker.state import Send

#: Where the channel lies in a task's process; 0, 1 and 2 are the standard streams.
CHANNEL_DESCRIPTOR: Final = 3

#: Frames of a thread that are written, as faulthandler does.
_DEEPEST: Final = 100

#: Above the places of a task's descriptors.
_HIGH: Final = 64


def arrange_descriptors(channel: int, stdout: int, stderr: int, stacks: int) -> None:
    """Put the five descriptors of a task where they belong and close every other one."""
    # The given ones may lie on each other's places: move them up first.
    high = [fcntl.fcntl(given, fcntl.F_DUPFD_CLOEXEC, _HIGH) for given in (stdout, stderr, channel, stacks)]
    source = os.open(os.devnull, os.O_RDONLY)
    os.dup2(source, 0)
    os.dup2(high[0], 1)
    os.dup2(high[1], 2)
    # These two must not pass to programs that the task starts.
    os.dup2(high[2], CHANNEL_DESCRIPTOR, inheritable=False)
    os.dup2(high[3], process.STACK_DESCRIPTOR, inheritable=False)
    os.closerange(process.STACK_DESCRIPTOR + 1, 1 << 20)


def forget_exit_handlers() -> None:
    """Drop what the template's modules wanted done when their process ends: this is another one.

    A temporary folder that a module made would otherwise be gone after the first task.
    """
    atexit._clear()  # noqa: SLF001 - there is no public way
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]  # noqa: SLF001
        finalizer.atexit = False
    # These three register themselves once, when they are imported or first used, and are wanted here as well.
    if getattr(weakref.finalize, "_registered_with_atexit", False):
        atexit.register(weakref.finalize._exitfunc)  # type: ignore[attr-defined]  # noqa: SLF001
    atexit.register(logging.shutdown)
    pools = sys.modules.get("multiprocessing.util")
    if pools is not None:
        atexit.register(pools._exit_function)  # noqa: SLF001


def run(
    load: Callable[[], Callable[..., Any]],
    confinement: Confinement,
    script: Script,
    streams: tuple[io.TextIOWrapper[Any], io.TextIOWrapper[Any]],
) -> NoReturn:
    """Serve the one task whose frame waits in the channel; never returns.

    `load` gives the callable; what it raises is reported like an error of the callable itself. `streams` are those
    of `line_streams`.
    """
    channel = open_channel()
    code = 1
    try:
        frame = _first_frame(channel)
        task_id, packed, state = frame.fields
        prepare_interpreter(streams)
        kept = None if state is None else _kept_state(state, frame.descriptors, channel.send)
        context = ChannelContext(channel, task_id, progress_every=confinement.progress_every, state=kept)
        enter(context, log_level=confinement.log_level)
        code = run_callable(Call(channel, context, load, script.apply_main), packed, frame.descriptors)
    except ChannelError:
        # The supervisor is gone. Nobody is left to tell.
        code = 1
    except BaseException:  # noqa: BLE001 - a fault of this package; the end of stderr is in the report
        traceback.print_exc()
    finally:
        leave(code)


def open_channel() -> ChildChannel:
    """Return this process's end of its control channel."""
    # With the family given, the socket module does not ask the kernel for it.
    return ChildChannel(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, CHANNEL_DESCRIPTOR))


def _kept_state(fields: list[Any], descriptors: list[int], send: Send) -> KeptState:
    name, most, packed = fields
    # Behind those of the arguments.
    own = [descriptors.pop()] if packed is not None and packed[0] else []
    return KeptState(name, most, packed, own, send)


def _first_frame(channel: ChildChannel) -> Frame:
    frame = channel.receive()
    if frame is None or frame.kind is not Kind.TASK:
        raise ProtocolViolation("the first frame of a task's channel is not TASK")
    return frame


def prepare_interpreter(streams: tuple[io.TextIOWrapper[Any], io.TextIOWrapper[Any]]) -> None:
    """Make the interpreter a task's own, once in the process's life."""
    process.call_on_signal(process.GENTLE_STACK_SIGNAL, _write_stacks)
    faulthandler.register(process.STACK_SIGNAL, file=process.STACK_DESCRIPTOR)
    # Line by line, so that the last words before a SIGKILL are out. The old ones may think that they write to a file.
    sys.stdout, sys.stderr = streams
    sys.__stdout__, sys.__stderr__ = streams  # type: ignore[misc]
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        # Python's own generator is seeded anew by fork; numpy's global one would repeat in every task.
        numpy_random.seed()


def _write_stacks(_number: int, frame: FrameType | None) -> None:
    """Write the Python stacks of all threads, this one's first, from where the signal found it."""
    own = threading.get_ident()
    with contextlib.suppress(OSError), open(os.dup(process.STACK_DESCRIPTOR), "w", encoding="utf-8") as file:
        file.seek(0)
        for ident, top in {own: frame, **sys._current_frames()}.items():  # noqa: SLF001 - documented, if "internal"
            kind = "Current thread" if ident == own else "Thread"
            file.write(f"{kind} 0x{ident:016x} (most recent call first):\n")
            place = frame if ident == own else top
            for _ in range(_DEEPEST):
                if place is None:
                    break
                code = place.f_code
                file.write(f'  File "{code.co_filename}", line {place.f_lineno} in {code.co_name}\n')
                place = place.f_back
            file.write("\n")


def line_streams() -> tuple[io.TextIOWrapper[Any], io.TextIOWrapper[Any]]:
    """Return streams for standard output and standard error that write line by line, whatever lies there later.

    Made over a pipe: one that was made over a file would go on to seek.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    streams = []
    for place in (1, 2):
        before = fcntl.fcntl(place, fcntl.F_DUPFD_CLOEXEC, _HIGH)
        os.dup2(writer, place)
        stream = open(place, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        os.dup2(before, place)
        os.close(before)
        streams.append(stream)
    os.close(reader)
    os.close(writer)
    stdout, stderr = streams
    return stdout, stderr


@dataclasses.dataclass(frozen=True)
class Call:
    """One task to run."""

    channel: ChildChannel
    context: ChannelContext
    load: Callable[[], Callable[..., Any]]
    #: Makes a `__main__` for the callable.
    apply_main: Callable[[Callable[..., Any]], None]


def run_callable(call: Call, packed: Any, descriptors: list[int]) -> int:
    """Call the callable and send what came of it; return the exit code for a process that has nothing else to do.

    In a process that the callable forked and that came back from it: send nothing. Raises ChannelError.
    """
    own = os.getpid()
    channel = call.channel
    try:
        function = call.load()
        call.apply_main(function)
        call.context.begin()
        args, kwargs = arguments.unpack(packed, descriptors)
        value = function(*args, **kwargs)
        if os.getpid() != own:
            # A process that the callable forked has come back from it as well. Only one of them is the task.
            return 0
        with values.encode(value) as encoded:
            call.context.keep_state()
            call.context.end()
            # These may be all that refers to memory which the supervisor would use again.
            del value, args, kwargs
            more = [True] if arguments.let_go() else []
            channel.send(
                frames.encode(Kind.RESULT, encoded.table, *more, descriptors=len(encoded.descriptors)),
                encoded.descriptors,
            )
    except BaseException as error:
        if isinstance(error, ChannelError) and os.getpid() == own:
            raise
        if os.getpid() != own:
            return _exit_code(error)
        failure = failures.encode(error)
        arguments.let_go()
        call.context.end()
        channel.send(failure)
        return 1
    return 0


def _exit_code(error: BaseException) -> int:
    """End a forked process as Python ends one."""
    if isinstance(error, SystemExit) and isinstance(error.code, int | None):
        return error.code or 0
    traceback.print_exception(error)
    return 1


def leave(code: int) -> NoReturn:
    """Leave as a program would: wait for threads, run exit handlers, flush. The supervisor bounds the time."""
    # Runs whatever happens: control must never return into the template's loop in a forked process.
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001 - what the interpreter itself calls
        atexit._run_exitfuncs()  # noqa: SLF001 - fork leaves the interpreter no other way to run them
    except BaseException:
        logging.getLogger(__name__).warning("an exit handler raised", exc_info=True)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


__all__ = [
    "CHANNEL_DESCRIPTOR",
    "Call",
    "arrange_descriptors",
    "forget_exit_handlers",
    "leave",
    "line_streams",
    "open_channel",
    "prepare_interpreter",
    "run",
    "run_callable",
]
