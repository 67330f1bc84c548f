"""What a task says about the error that ended it, whatever that error does when it is looked at."""

from __future__ import annotations

import errno
import os
import traceback
from typing import TYPE_CHECKING, Final

from scaleout_mp.errors import ScaleoutError
from scaleout_mp.ipc import frames
from scaleout_mp.ipc.frames import Kind
from scaleout_mp.ipc.messages import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Longest traceback and error message that are sent, in characters.
MAX_TRACEBACK: Final = 1 << 16
MAX_MESSAGE: Final = 1 << 12

#: Errors that are looked at, of a group of thousands say.
_MOST_CAUSES: Final = 1000

#: Where frames of a traceback are left out: users look for their own code.
_PACKAGE: Final = os.path.dirname(os.path.dirname(__file__))
_OURS: Final = tuple(os.path.join(_PACKAGE, name, "") for name in ("worker", "client", "ipc", "model"))
_IMPORTS: Final = "<frozen importlib."


def encode(error: BaseException) -> bytes:
    """Return the FAILURE frame for what a callable raised."""
    try:
        message = (describe(error) + _where(error))[:MAX_MESSAGE]
        return frames.encode(Kind.FAILURE, class_name(error), message, format_traceback(error), _refused(error))
    except BaseException as broken:  # noqa: BLE001 - what a hostile exception raises must not hide the failure itself
        text = f"its error cannot be shown, which raised {class_name(broken)}"
        return frames.encode(Kind.FAILURE, class_name(error), text, "", None)


def class_name(error: BaseException) -> str:
    """Return the name of an error's class, whatever the class is."""
    # Not by way of a metaclass, which could say anything.
    name: str = type.__dict__["__name__"].__get__(type(error))
    return _plain(name[:256])


def _plain(text: str) -> str:
    """Return text that can be sent, of the very type `str`: a subclass could do anything when it is used."""
    return str.encode(text, "utf-8", "backslashreplace").decode()


def describe(error: BaseException) -> str:
    """Return the message of an error, whatever its `__str__` does; at most `MAX_MESSAGE` characters of it."""
    try:
        return _plain(str(error)[:MAX_MESSAGE])
    except BaseException:  # noqa: BLE001 - a hostile __str__ must not hide the failure itself
        return f"<{class_name(error)} whose message cannot be shown>"


def _where(error: BaseException) -> str:
    """Say where a relative path was looked for, which is not where the user's program stands."""
    name = OSError.__dict__["filename"].__get__(error) if isinstance(error, FileNotFoundError) else None
    if type(name) is not str or os.path.isabs(name) or os.environ.get("TMPDIR") != os.getcwd():
        return ""
    return ' in the task\'s scratch folder; working_directory="inherit" has tasks start where the program stands'


def format_traceback(error: BaseException) -> str:
    """Return the traceback of an error without this package's part, at most `MAX_TRACEBACK` characters."""
    try:
        shown = traceback.TracebackException.from_exception(error, limit=-32, compact=True)
        _leave_out_ours(shown, error)
        text = _plain("".join(shown.format()))
    except BaseException as broken:  # noqa: BLE001 - as above
        return f"<traceback cannot be shown: {class_name(broken)}>"
    if len(text) <= MAX_TRACEBACK:
        return text
    # A message of megabytes stands at the end: without the beginning, nobody would see where it comes from.
    half = MAX_TRACEBACK // 2 - 4
    return f"{text[:half]}\n[...]\n{text[-half:]}"


def _leave_out_ours(shown: traceback.TracebackException, error: BaseException) -> None:
    """Take our frames, and the import system's, off the beginning; and off the end where ours tells the user something.

    A frame is left unless the error says all by itself.
    """
    told_by_us = isinstance(error, ScaleoutError)
    seen: traceback.TracebackException | None = shown
    while seen is not None:
        _drop_leading(seen.stack, keep=1)
        seen = seen.__cause__ or seen.__context__
    if told_by_us or isinstance(error, SyntaxError):
        _drop_leading(shown.stack, keep=0)
    if told_by_us and shown.stack and _is_ours(shown.stack[-1].filename):
        first = next(at for at, frame in enumerate(shown.stack) if _is_ours(frame.filename))
        del shown.stack[first:]
    if not shown.stack:
        # Else its heading would stand alone.
        shown.stack = None  # type: ignore[assignment]


def _drop_leading(stack: traceback.StackSummary, *, keep: int) -> None:
    while len(stack) > keep and (_is_ours(stack[0].filename) or stack[0].filename.startswith(_IMPORTS)):
        del stack[0]


def _is_ours(path: str) -> bool:
    # Of msgpack are the frames between two of `ipc/values.py`.
    return path.startswith((*_OURS, "msgpack/")) or "/msgpack/" in path


def _refused(error: BaseException) -> str | None:
    """Say which resource the kernel refused, when that is what was raised, or why it was."""
    for one in _with_causes(error):
        number = OSError.__dict__["errno"].__get__(one) if isinstance(one, OSError) else None
        text = describe(one) if isinstance(one, RuntimeError) else ""
        if isinstance(one, MemoryError) or number == errno.ENOMEM or "allocate memory" in text:
            # The last is torch, which raises RuntimeError.
            return Refusal.MEMORY
        if number == errno.EFBIG:
            return Refusal.FILE_SIZE
        if number == errno.EMFILE:
            return Refusal.OPEN_FILES
        if "start new thread" in text:
            return Refusal.PIDS
    return None


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, those of a group, and what it was raised "from", each once: causes may be cyclic."""
    left, seen = [error], set[int]()
    while left and len(seen) < _MOST_CAUSES:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, BaseExceptionGroup):
            left += BaseExceptionGroup.exceptions.__get__(one)
        cause = BaseException.__dict__["__cause__"].__get__(one)
        if cause is not None:
            left.append(cause)
