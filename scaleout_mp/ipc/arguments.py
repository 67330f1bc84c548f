"""Arguments on the way from the supervisor into a child.

Pickle goes this way only: a child may trust its supervisor, never the reverse. Models pass as descriptors, large
buffers through a memfd that the child maps copy-on-write.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import pickle
from typing import TYPE_CHECKING, Any, Final, Self

from scaleout_mp.errors import ValueNotSendable
from scaleout_mp.ipc import segments, values
from scaleout_mp.ipc.callables import OutOfBand, one_line, pickler_class, pickles
from scaleout_mp.ipc.channel import close_all
from scaleout_mp.ipc.frames import MAX_DESCRIPTORS
from scaleout_mp.ipc.lent import LEND_FROM, Borrowed, LentMemory
from scaleout_mp.model import ScaleoutModel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

#: Behind a table that was not pickled, and of one in memory that is used again.
_PLAIN: Final = "plain"
_LENT: Final = "lent"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedArguments:
    """Arguments ready to send: `table` goes into the frame, `descriptors` beside it.

    Close it once the frame is sent.
    """

    table: list[Any]
    descriptors: list[int]
    #: Bytes of models among them, which the child maps and does not make its own.
    model_bytes: int
    #: Bytes of the arguments themselves that travel in a memfd.
    memory_bytes: int
    #: Where they are, when that is to be used again.
    lent: LentMemory | None = None

    def copy(self) -> Self:
        """Return the same again, to be sent a second time. Raises OSError."""
        return dataclasses.replace(self, descriptors=[os.dup(descriptor) for descriptor in self.descriptors])

    def close(self) -> None:
        """Free what was made for sending; the models are left alone."""
        close_all(self.descriptors)
        self.descriptors.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def pack(args: Sequence[Any], kwargs: Mapping[str, Any]) -> PackedArguments:
    """Pickle arguments. Raises ValueNotSendable that names the argument."""
    models: list[ScaleoutModel] = []
    buffers = OutOfBand()
    pickled = _pickle((tuple(args), dict(kwargs)), models, buffers)
    table, memory = segments.store([pickled, *buffers.views])
    if len(models) >= MAX_DESCRIPTORS:
        raise ValueNotSendable(f"a task takes at most {MAX_DESCRIPTORS - 1} models, not {len(models)}")
    # Copies: the caller may close its models while the task still waits for its turn.
    descriptors = [os.dup(model.fileno()) for model in models]
    memory_bytes = 0
    if memory is not None:
        memory_bytes = memory.size
        descriptors.insert(0, os.dup(memory.fileno()))
        memory.close()
    return PackedArguments(
        table=[memory is not None, table],
        descriptors=descriptors,
        model_bytes=sum(model.size for model in models),
        memory_bytes=memory_bytes,
    )


def pack_plain(args: Sequence[Any], *, lend: Callable[[int], LentMemory | None] = lambda _: None) -> PackedArguments:
    """Pack arguments that are numbers, texts, arrays and the like without pickling them; others as `pack` does.

    Several times as quick for what is small. Lists and dicts that are in there twice arrive as two. What is large goes
    into memory from `lend`, which is then `lent`. Raises ValueNotSendable.
    """
    parts = values.encode_exactly(list(args))
    if parts is None:
        return pack(args, {})
    size = sum(len(part) + -len(part) % segments.ALIGNMENT for part in parts)
    lent = lend(size) if size >= LEND_FROM else None
    if lent is not None:
        return PackedArguments(
            table=[True, lent.fill(parts), _LENT],
            descriptors=[os.dup(lent.fileno())],
            model_bytes=0,
            memory_bytes=lent.size,
            lent=lent,
        )
    table, memory = segments.store(parts)
    descriptors, memory_bytes = [], 0
    if memory is not None:
        descriptors, memory_bytes = [os.dup(memory.fileno())], memory.size
        memory.close()
    return PackedArguments(
        table=[memory is not None, table, _PLAIN], descriptors=descriptors, model_bytes=0, memory_bytes=memory_bytes
    )


@functools.cache
def _pickler_class() -> Any:
    """Return the class that takes models out of what it pickles. Made once: each call of a worker pickles."""

    class Pickler(pickler_class()):  # type: ignore[misc]  # made when it is first used
        def __init__(self, models: list[ScaleoutModel], *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._found = models

        def persistent_id(self, item: Any) -> int | None:
            if not isinstance(item, ScaleoutModel):
                return None
            if not any(item is model for model in self._found):
                self._found.append(item)
            return next(index for index, model in enumerate(self._found) if model is item)

    return Pickler


def _pickle(value: tuple[Any, ...], models: list[ScaleoutModel], buffers: OutOfBand) -> bytes:
    file = io.BytesIO()
    try:
        _pickler_class()(models, file, protocol=5, buffer_callback=buffers.keep_in_place).dump(value)
    except Exception as error:
        args, kwargs = value
        named = {f"argument {index}": item for index, item in enumerate(args)} | kwargs
        culprit = next(
            (name for name, item in named.items() if not _is_model(item) and not pickles(item)),
            "an argument",
        )
        raise ValueNotSendable(f"{culprit} cannot be sent to a task process: {one_line(error)}") from error
    return file.getvalue()


def _is_model(value: Any) -> bool:
    return isinstance(value, ScaleoutModel)


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: memoryview, buffers: list[memoryview], models: list[ScaleoutModel]) -> None:
        super().__init__(io.BytesIO(pickled), buffers=buffers)
        self._models = models

    def persistent_load(self, index: int) -> ScaleoutModel:
        return self._models[index]


#: What this process was lent for the task that it runs.
_borrowed: list[Borrowed] = []


def let_go() -> bool:
    """Return whether the task was lent memory and nothing refers to it any more; in the child, at the task's end."""
    gone = [borrowed.let_go() for borrowed in _borrowed]
    _borrowed.clear()
    return bool(gone) and all(gone)


def unpack(table: Any, descriptors: list[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments, in the child. Takes over the descriptors."""
    has_memory, inner, *plain = table
    if plain == [_PLAIN]:
        return tuple(values.decode([has_memory, inner], descriptors, max_model_size=0)), {}
    if plain == [_LENT]:
        borrowed = Borrowed(descriptors.pop())
        _borrowed.append(borrowed)
        return tuple(values.decode_segments(borrowed.segments(inner))), {}
    memory = descriptors.pop(0) if has_memory else None
    pickled, *buffers = segments.load(inner, memory)
    models = [ScaleoutModel.from_fd(descriptor, verify=False) for descriptor in descriptors]
    close_all(descriptors)
    args, kwargs = _Unpickler(pickled, buffers, models).load()
    return args, kwargs
