"""What a task returns, on the way out of a child: nothing in it can run code.

msgpack with four additions: tuples, numpy arrays, numpy scalars as plain numbers, and models by descriptor. The
supervisor bounds and checks everything before it builds an object from it.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any, Final, Literal, Self

import msgpack

from scaleout_mp.errors import ModelFormatError, ProtocolViolation, ValueNotSendable
from scaleout_mp.ipc import segments
from scaleout_mp.ipc.channel import close_all
from scaleout_mp.model import ScaleoutModel
from scaleout_mp.model.memfd import MemoryFile, SealedMemory, verify_sealed
from scaleout_mp.model.numpy_used import is_array, is_masked, is_scalar, np

_TUPLE: Final = 1
_ARRAY: Final = 2
_MODEL: Final = 3

#: Bytes of a returned value without its arrays and models.
MAX_TREE: Final = 1 << 26
#: Tuples in tuples; each level is a call of the decoder in C.
MAX_DEPTH: Final = 64
#: Models in one returned value.
MAX_MODELS: Final = 16
_PLAIN_TYPES: Final[tuple[type[Any], ...]] = (dict, list, str, bytes, int, float)
_PLAIN_KINDS: Final = frozenset("biufcmMSUV")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedValue:
    """A value ready to send: `table` goes into the frame, `descriptors` beside it."""

    table: list[Any]
    descriptors: list[int]
    _owned: list[SealedMemory]
    #: Whose descriptors are among them: they must live until these are sent, whoever else lets go of them.
    _models: list[ScaleoutModel]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for memory in self._owned:
            memory.close()


class _Encoder:
    def __init__(self, *, exact: bool = False) -> None:
        """`exact`: nothing is turned into a simpler type on the way."""
        self._exact = exact
        self.arrays: list[memoryview] = []
        self.models: list[ScaleoutModel] = []
        self._depth = 0

    def pack(self, value: Any) -> bytes:
        if self._depth >= MAX_DEPTH:
            raise ValueNotSendable(f"tuples in a returned value can be nested {MAX_DEPTH} deep, not more")
        self._depth += 1
        packed: bytes = msgpack.packb(value, default=self._special, strict_types=True)
        self._depth -= 1
        return packed

    def _special(self, value: Any) -> Any:
        if self._exact and type(value) is not tuple and not (is_array(value) and type(value) is np.ndarray):
            raise ValueNotSendable(f"a {type(value).__name__} does not pass as it is")
        if isinstance(value, ScaleoutModel):
            return msgpack.ExtType(_MODEL, self.pack(self._model_index(value)))
        if isinstance(value, tuple):
            return msgpack.ExtType(_TUPLE, self.pack(list(value)))
        if is_scalar(value):
            return value.item()
        if is_array(value):
            return msgpack.ExtType(_ARRAY, self._array(value))
        plain = next((kind for kind in _PLAIN_TYPES if isinstance(value, kind)), None)
        if plain is not None:
            # Subclasses, such as an OrderedDict or an IntEnum, arrive as their plain base.
            return plain(value)
        if isinstance(value, bytearray | memoryview):
            return bytes(value)
        raise ValueNotSendable(
            f"a {type(value).__module__}.{type(value).__qualname__} cannot be returned from a task: "
            "return models, numpy arrays, numbers, strings, and lists, tuples and dicts of them"
        )

    def _model_index(self, model: ScaleoutModel) -> int:
        if len(self.models) >= MAX_MODELS:
            raise ValueNotSendable(f"a task can return at most {MAX_MODELS} models")
        self.models.append(model)
        return len(self.models) - 1

    def _array(self, array: np.ndarray[Any, Any]) -> bytes:
        if not _passes(array.dtype):
            raise ValueNotSendable(f"an array of dtype {array.dtype} cannot be returned from a task")
        if is_masked(array):
            raise ValueNotSendable("a masked array cannot be returned from a task: return its data and its mask")
        order: Literal["C", "F"] = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
        flat = np.asarray(array, order=order).reshape(-1, order=order)
        self.arrays.append(flat.view(np.uint8).data if flat.nbytes else memoryview(b""))
        return self.pack([array.dtype.str, list(array.shape), order, len(self.arrays)])


def _passes(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype is made again from its `str`: other packages', as bfloat16, call themselves void there."""
    of_numpy = dtype.kind != "V" or dtype.type is np.void
    return bool(of_numpy and dtype.kind in _PLAIN_KINDS and not dtype.hasobject and not dtype.names and dtype.itemsize)


def encode(value: Any) -> EncodedValue:
    """Encode what a task returned. Raises ValueNotSendable that names the type which cannot pass."""
    encoder = _Encoder()
    try:
        tree = encoder.pack(value)
    except (ValueError, OverflowError, TypeError) as error:
        if isinstance(error, ValueNotSendable):
            raise
        raise ValueNotSendable(f"the returned value cannot be sent: {error}") from error
    if len(tree) > MAX_TREE:
        raise ValueNotSendable(f"the returned value has {len(tree)} bytes without its arrays; at most {MAX_TREE} pass")
    if len(encoder.arrays) >= segments.MAX_SEGMENTS:
        raise ValueNotSendable(f"a task can return at most {segments.MAX_SEGMENTS - 1} arrays")
    table, memory = segments.store([tree, *encoder.arrays])
    owned = [] if memory is None else [memory]
    descriptors = [] if memory is None else [memory.fileno()]
    for model in encoder.models:
        descriptor, copy = _sealed_descriptor(model)
        descriptors.append(descriptor)
        if copy is not None:
            owned.append(copy)
    return EncodedValue(
        table=[memory is not None, table], descriptors=descriptors, _owned=owned, _models=encoder.models
    )


def encode_exactly(value: Any) -> list[bytes | memoryview] | None:
    """Return the segments of plain values and numpy arrays, which arrive as what they were; None for all else."""
    encoder = _Encoder(exact=True)
    try:
        tree = encoder.pack(value)
    except (ValueError, OverflowError, TypeError):
        return None
    if len(tree) > MAX_TREE or len(encoder.arrays) >= segments.MAX_SEGMENTS:
        return None
    return [tree, *encoder.arrays]


def decode_segments(views: list[memoryview]) -> Any:
    """Return a value without models from its segments. Raises ProtocolViolation."""
    return _Decoder(views, []).unpack(views[0])


def _sealed_descriptor(model: ScaleoutModel) -> tuple[int, SealedMemory | None]:
    """Return a sealed descriptor of a model; one that lies in a file is copied, since files can change."""
    try:
        verify_sealed(model.fileno())
    except ModelFormatError:
        with MemoryFile() as file:
            file.write(*model.iter_chunks())
            copy = file.seal()
        return copy.fileno(), copy
    return model.fileno(), None


class _Decoder:
    def __init__(self, views: list[memoryview], models: list[ScaleoutModel]) -> None:
        self._views = views
        self._models = models
        self._depth = 0

    def unpack(self, packed: memoryview | bytes) -> Any:
        if self._depth > MAX_DEPTH:
            raise ProtocolViolation("a returned value is nested too deep")
        self._depth += 1
        value = msgpack.unpackb(packed, ext_hook=self._special, strict_map_key=False, max_ext_len=MAX_TREE)
        self._depth -= 1
        return value

    def _special(self, code: int, data: bytes) -> Any:
        inner = self.unpack(data)
        if code == _TUPLE and isinstance(inner, list):
            return tuple(inner)
        if code == _MODEL and type(inner) is int and 0 <= inner < len(self._models):
            return self._models[inner]
        if code == _ARRAY and isinstance(inner, list) and len(inner) == 4:
            return self._array(*inner)
        raise ProtocolViolation(f"a returned value holds an unknown extension {code}")

    def _array(self, dtype: Any, shape: Any, order: Any, index: Any) -> np.ndarray[Any, Any]:
        if not (isinstance(dtype, str) and len(dtype) <= 64 and order in {"C", "F"} and isinstance(shape, list)):
            raise ProtocolViolation("an array in a returned value has a bad header")
        if not (type(index) is int and 0 < index < len(self._views)):
            raise ProtocolViolation("an array in a returned value has no bytes")
        if len(shape) > 64 or not all(type(length) is int and length >= 0 for length in shape):
            raise ProtocolViolation("an array in a returned value has a bad shape")
        try:
            kind = np.dtype(dtype)
        except (TypeError, ValueError, SyntaxError):
            raise ProtocolViolation("an array in a returned value has an unknown dtype") from None
        view = self._views[index]
        if not kind.itemsize or kind.subdtype is not None:
            raise ProtocolViolation("an array in a returned value has elements of no size")
        if kind.hasobject or kind.kind not in _PLAIN_KINDS or math.prod(shape) * kind.itemsize != view.nbytes:
            raise ProtocolViolation("an array in a returned value does not fit its bytes")
        return (
            np.frombuffer(view, dtype=np.uint8).view(kind).reshape(shape, order=order)
            if view.nbytes
            else np.empty(shape, kind)
        )


def decode(table: Any, descriptors: list[int], *, max_model_size: int) -> Any:
    """Check and return what a child sent. Takes over the descriptors. Blocks while the models' checksums are computed.

    Raises ProtocolViolation when anything does not hold, models that are no models included.
    """
    models: list[ScaleoutModel] = []
    try:
        return _decode(table, descriptors, models, max_model_size)
    except Exception as error:
        for model in models:
            model.close()
        if isinstance(error, ProtocolViolation):
            raise
        # Whatever it provoked in here, it is the sender's doing.
        raise ProtocolViolation(f"a result cannot be read: {type(error).__name__}: {error}") from error
    finally:
        close_all(descriptors)


def _decode(table: Any, descriptors: list[int], models: list[ScaleoutModel], max_model_size: int) -> Any:
    if not (isinstance(table, list) and len(table) == 2 and isinstance(table[0], bool)):
        raise ProtocolViolation("a result has no table")
    if len(descriptors) - table[0] > MAX_MODELS or len(descriptors) < table[0]:
        raise ProtocolViolation("a result has too many descriptors, or too few")
    views = segments.load(table[1], descriptors.pop(0) if table[0] else None)
    if not views or views[0].nbytes > MAX_TREE:
        raise ProtocolViolation("a result is empty, or too large")
    # One by one: the caller closes those that were adopted before a bad one.
    for descriptor in descriptors:
        models.append(_adopt(descriptor, max_model_size))  # noqa: PERF401
    return _Decoder(views, models).unpack(views[0])


def _adopt(descriptor: int, max_model_size: int) -> ScaleoutModel:
    size = os.fstat(descriptor).st_size
    if size > max_model_size:
        raise ProtocolViolation(f"a returned model has {size} bytes; at most {max_model_size} are taken")
    return ScaleoutModel.from_fd(descriptor)
