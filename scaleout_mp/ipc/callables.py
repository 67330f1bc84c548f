"""Callables on the way from the supervisor into its template, a worker or a fresh interpreter.

Pickled once, with the arrays that they capture beside the pickle: those are neither copied while the interpreter's lock
is held nor once more for each process that gets them.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import hashlib
import io
import mmap
import os
import pickle
import types
from collections import ChainMap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

from scaleout_mp.errors import CallbackNotSendable
from scaleout_mp.ipc import frames, segments
from scaleout_mp.ipc.frames import Frame, Kind
from scaleout_mp.task import loading

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scaleout_mp.model.memfd import SealedMemory

#: Buffers below this many bytes are pickled in place.
_OUT_OF_BAND: Final = 1 << 14
#: What cloudpickle puts where the name of a code's file was.
_NO_FILE: Final = "<dynamic-code>"
#: What a function can fill without an assignment.
_CONTAINERS: Final = (list, dict, set)


class OutOfBand:
    """Buffers that stay out of a pickle."""

    def __init__(self) -> None:
        self.views: list[memoryview] = []

    def keep_in_place(self, buffer: pickle.PickleBuffer) -> bool:
        """Return whether to pickle a buffer in place after all; what pickle calls for each."""
        view = buffer.raw()
        if view.nbytes < _OUT_OF_BAND or len(self.views) >= segments.MAX_SEGMENTS - 1:
            return True
        self.views.append(view)
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedCallable:
    """A callable, pickled once, that any number of tasks can run."""

    #: Digest of the pickle: equal keys mean equal callables.
    key: str
    #: Qualified name, for people.
    name: str
    #: Of `segments.store`: the pickle, and the buffers that are not in it.
    table: list[Any] = dataclasses.field(compare=False, repr=False)
    memory: SealedMemory | None = dataclasses.field(compare=False, repr=False)

    @classmethod
    def of(cls, pickled: bytes, buffers: Sequence[memoryview] = (), *, name: str, key: str | None = None) -> Self:
        """Take a copy of the parts. `key` is theirs where the caller knows a better one."""
        parts = [memoryview(pickled), *buffers]
        table, memory = segments.store(parts)
        return cls(key=key or _digest(parts), name=name, table=table, memory=memory)

    def load_frame(self) -> tuple[bytes, list[int]]:
        """Return the frame that has another process load it, and the descriptors beside it, which stay ours."""
        descriptors = [] if self.memory is None else [self.memory.fileno()]
        return frames.encode(Kind.LOAD, self.key, self.table, descriptors=len(descriptors)), descriptors


def _digest(parts: Sequence[memoryview]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.nbytes.to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


class SentCallable:
    """A callable where it arrived: to be loaded, or handed on. Owns the descriptor that came with it."""

    def __init__(self, table: Any, descriptor: int | None) -> None:
        self.table = table
        self._descriptor = descriptor

    @classmethod
    def from_frame(cls, frame: Frame) -> Self:
        """Take over what a LOAD frame brought."""
        return cls(frame.fields[1], frame.descriptors.pop() if frame.descriptors else None)

    def fileno(self) -> int | None:
        """Return the descriptor of the memory that its table speaks of; None: there is no such memory."""
        return self._descriptor

    def load(self) -> Callable[..., Any]:
        """Return the callable, once; arrays that it captured lie in the memory that came with it, copy-on-write.

        Raises whatever its loading raises.
        """
        descriptor, self._descriptor = self._descriptor, None
        return _unpickle(segments.load(self.table, descriptor))

    def load_for_forks(self) -> Callable[..., Any]:
        """Return the callable, with copies of its arrays that hold no descriptor.

        A process that is forked from this one closes them all, and an array that it drops must not close a number which
        by then is another file's.
        """
        if self._descriptor is None:
            return _unpickle(segments.load(self.table, None))
        size = os.fstat(self._descriptor).st_size
        with mmap.mmap(self._descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as source:
            own = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            own[:] = source
        return _unpickle(segments.split(self.table, memoryview(own)))

    def close(self) -> None:
        """Give the descriptor back. Safe to call again."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _unpickle(parts: Sequence[memoryview]) -> Callable[..., Any]:
    pickled, *buffers = parts
    with loading():
        loaded: Callable[..., Any] = pickle.loads(pickled, buffers=buffers)
    return loaded


def prepare(function: Callable[..., Any]) -> PreparedCallable:
    """Pickle a callable. Raises CallbackNotSendable, which names what inside it cannot be sent."""
    name = callable_name(function)
    if not callable(function):
        raise CallbackNotSendable(f"{name} is not callable", callback=name)
    buffers = OutOfBand()
    file = io.BytesIO()
    try:
        pickler_class()(file, protocol=5, buffer_callback=buffers.keep_in_place).dump(function)
    except Exception as error:
        # Past our own wrapper, to what the user knows.
        culprit = _find_culprit(getattr(function, "callback", function))
        raise CallbackNotSendable(
            f"callback {name} cannot be sent to a task process: it captures {culprit} ({one_line(error)}). "
            "Create such objects inside the callback, or in a module that it imports.",
            callback=name,
            culprit=culprit,
        ) from error
    return PreparedCallable.of(file.getvalue(), buffers.views, name=name)


@functools.cache
def pickler_class() -> Any:
    """Return cloudpickle's pickler with code that keeps the name of its file.

    cloudpickle 3.1.2 and later replace the name, to have equal pickles of equal functions; a traceback then has neither
    the file nor the lines of who wrote the callback.
    """
    import cloudpickle

    reduce_code = cloudpickle.Pickler.dispatch_table[types.CodeType]

    def reduce_with_file(code: types.CodeType) -> Any:
        make, arguments, *rest = reduce_code(code)
        # A string of its own: whether the code's is shared depends on what else was compiled, and shows in the pickle.
        file = "".join(code.co_filename)
        return make, tuple(file if argument == _NO_FILE else argument for argument in arguments), *rest

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
        dispatch_table: ClassVar = ChainMap({types.CodeType: reduce_with_file}, cloudpickle.Pickler.dispatch_table)

    return Pickler


def callable_name(function: Any) -> str:
    """Return what people call a callable: `module.qualname`, without `__main__`."""
    inner = getattr(function, "callback", function)
    while isinstance(inner, functools.partial):
        inner = inner.func
    name = getattr(inner, "__qualname__", None) or type(inner).__qualname__
    module = getattr(inner, "__module__", None)
    return name if module in {None, "__main__"} else f"{module}.{name}"


def copied_globals(first: Callable[..., Any], then: Callable[..., Any]) -> list[str]:
    """Return the globals of a script that its function `first` seems to fill for another one, `then`.

    Where the two are sent one by one, each takes a copy along: what the first puts there, the other does not find.
    """
    filling, using = _plain_function(first), _plain_function(then)
    if filling is None or using is None or filling.__globals__ is not using.__globals__:
        return []
    names = filling.__globals__
    if names.get("__name__") != "__main__":
        # Of a module, both find the one that is imported there.
        return []
    stored = {step.argval for step in dis.get_instructions(filling) if step.opname == "STORE_GLOBAL"}
    empty = {name for name in filling.__code__.co_names if isinstance(names.get(name), _CONTAINERS) and not names[name]}
    return sorted((stored | empty) & set(using.__code__.co_names))


def _plain_function(function: Any) -> types.FunctionType | None:
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    return function if isinstance(function, types.FunctionType) else None


def one_line(error: BaseException) -> str:
    """Return class and message of an error, cut to a line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def pickles(value: Any, *, plainly: bool = False) -> bool:
    """Return whether a value can be pickled by itself: by pickle alone if `plainly`, else by cloudpickle."""
    dumps: Callable[[Any], bytes] = pickle.dumps
    if not plainly:
        import cloudpickle

        dumps = cloudpickle.dumps
    try:
        dumps(value)
    except Exception:  # noqa: BLE001 - any error of a user's __reduce__ means: it does not
        return False
    return True


def _captured(value: Any) -> dict[str, Any]:
    """Return what a callable or object refers to, by the name a user knows it by."""
    if isinstance(value, types.MethodType):
        return {"self": value.__self__, "function": value.__func__}
    if isinstance(value, types.FunctionType):
        cells = dict(zip(value.__code__.co_freevars, value.__closure__ or (), strict=False))
        captured = {name: cell.cell_contents for name, cell in cells.items() if cell != types.CellType()}
        captured |= {name: value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__}
        return captured | {f"default {index}": default for index, default in enumerate(value.__defaults__ or ())}
    if isinstance(value, functools.partial):
        given = {f"argument {index}": argument for index, argument in enumerate(value.args)}
        return {"function": value.func, **given, **value.keywords, **vars(value)}
    if isinstance(value, Mapping):
        return {f"[{key!r}]": item for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return {f"[{index}]": item for index, item in enumerate(value)}
    return dict(getattr(value, "__dict__", {}))


def _find_culprit(function: Any, most: int = 8) -> str:
    """Walk down to the innermost thing that does not pickle and return its path and type."""
    path = []
    value = function
    for _ in range(most):
        bad = next(((name, item) for name, item in _captured(value).items() if not pickles(item)), None)
        if bad is None:
            break
        name, value = bad
        path.append(name)
    where = "".join(part if part.startswith("[") else f".{part}" for part in path).lstrip(".") or "something"
    return f"{where}, a {type(value).__module__}.{type(value).__qualname__}"
