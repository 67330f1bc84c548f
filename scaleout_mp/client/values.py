"""Turn what users log and return into what the wire and JSON carry."""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from scaleout_mp.ipc.messages import MAX_KEYS, MAX_NAME, MAX_PAYLOAD, MAX_VALUE

logger = logging.getLogger(__name__)

C = TypeVar("C")

#: Bytes of JSON that a callback may return: servers take messages of 4 MiB, and several ends ride in one report.
MAX_JSON: Final = 1 << 20
#: Deeper than any sensible result; a structure that contains itself is caught by it.
_MAX_DEPTH = 64


def metric_values(values: Mapping[Any, Any], *, what: str = "metric") -> dict[str, float]:
    """Return the values as floats; numpy scalars and one-element tensors are understood.

    Raises TypeError that names the key whose value is not a number, ValueError on too many or too long keys.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{what}s must be a dict of numbers, not {type(values).__name__}")
    _require_few(values, what)
    return {_name(key, what): _number(key, value, what) for key, value in values.items()}


def _require_few(values: Mapping[Any, Any], what: str) -> None:
    if len(values) > MAX_KEYS:
        raise ValueError(f"{len(values)} {what}s are too many for one call: at most {MAX_KEYS}")


def _name(key: Any, what: str) -> str:
    name = str(key)
    if len(name) > MAX_NAME:
        raise ValueError(f"the key of {what} {name[:40]!r}... has {len(name)} characters; at most {MAX_NAME} pass")
    return name


def _number(key: Any, value: Any, what: str) -> float:
    if not isinstance(value, str | bytes | bytearray) and (hasattr(value, "__float__") or hasattr(value, "__index__")):
        try:
            # An array of one element has an item; float() of it is deprecated in numpy.
            return float(value.item() if hasattr(value, "item") else value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{what} {key!r} is not one number but {type(value).__name__}: {error}") from error
    raise TypeError(f"{what} {key!r} must be a number, not {type(value).__name__}")


def attribute_values(attributes: Mapping[Any, Any]) -> dict[str, str]:
    """Return the attributes as strings.

    Raises TypeError when they are not a mapping, ValueError that names the key of what is too long.
    """
    if not isinstance(attributes, Mapping):
        raise TypeError(f"attributes must be a dict, not {type(attributes).__name__}")
    _require_few(attributes, "attribute")
    values = {
        _name(key, "attribute"): value if isinstance(value, str) else str(value) for key, value in attributes.items()
    }
    for key, text in values.items():
        if len(text) > MAX_VALUE:
            raise ValueError(f"attribute {key!r} has {len(text)} characters; at most {MAX_VALUE} pass")
    return values


def inference_payload(payload: Any) -> str:
    """Return a result of inference as the JSON of an object; a value that is none becomes {"value": it}.

    Raises TypeError that names what JSON cannot carry, ValueError when there is too much of it.
    """
    plain = json_value(payload, path="payload")
    text = json.dumps(plain if isinstance(plain, dict) else {"value": plain})
    if len(text) > MAX_PAYLOAD:
        raise ValueError(f"a result of inference has {len(text)} bytes of JSON; at most {MAX_PAYLOAD} pass")
    return text


def json_value(value: Any, *, path: str, arrays: bool = False) -> Any:
    """Return `value` with numpy scalars turned into Python's own, checked to be JSON-serialisable.

    `arrays`: numpy arrays, tensors and the like, which cannot be sent otherwise, become lists.

    NaN and infinities, which JSON does not have, become null, with one warning that names the first: a figure that
    ran away must not cost the training. Raises TypeError that names the place, starting from `path`, of what JSON
    cannot carry; ValueError for whole numbers of more than 64 bits and strings that are no text.
    """
    lost: list[str] = []
    plain = _json_value(_listed(value, path) if arrays else value, path, 0, lost)
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        logger.warning("%s%s: not a finite number, sent as null", lost[0], more, extra={"action": "not_finite"})
    return plain


def _listed(value: Any, path: str, depth: int = 0) -> Any:
    """Return `value` with arrays as lists. Raises ValueError for what is too large before it becomes one."""
    if isinstance(value, Mapping) and depth <= _MAX_DEPTH:
        return {key: _listed(item, f"{path}[{key!r}]", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple) and depth <= _MAX_DEPTH:
        return [_listed(item, f"{path}[{at}]", depth + 1) for at, item in enumerate(value)]
    if not (hasattr(value, "tolist") and getattr(value, "shape", None)):
        return value
    size = math.prod(value.shape)
    # A digit and a comma each.
    if 2 * size > MAX_JSON:
        raise ValueError(f"{path} is an array of {size} elements, more than {MAX_JSON} bytes of JSON")
    return value.tolist()


def _json_value(value: Any, path: str, depth: int, lost: list[str]) -> Any:
    if depth > _MAX_DEPTH:
        raise TypeError(f"{path[:80]}... is nested more than {_MAX_DEPTH} deep, or contains itself")
    if isinstance(value, Mapping):
        return {
            _json_key(key, path): _json_value(item, f"{path}[{key!r}]", depth + 1, lost) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_json_value(item, f"{path}[{at}]", depth + 1, lost) for at, item in enumerate(value)]
    plain = value if value is None or type(value) in (bool, int, float, str) else _plain_scalar(value)
    if isinstance(plain, float) and not math.isfinite(plain):
        lost.append(path)
        return None
    if type(plain) is int and not -(1 << 63) <= plain < 1 << 64:
        raise ValueError(f"{path} is a whole number of more than 64 bits")
    if type(plain) is str and not _is_text(plain):
        raise ValueError(f"{path} is a string with a lone surrogate in it, which is no text")
    if plain is not None or value is None:
        return plain
    hint = "; call .tolist() on it" if hasattr(value, "tolist") else ""
    raise TypeError(f"{path} is of type {type(value).__name__}, which JSON cannot carry{hint}")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_key(key: Any, path: str) -> str:
    plain = key if isinstance(key, str) else _plain_scalar(key)
    if plain is None:
        raise TypeError(f"{path} has a key of type {type(key).__name__}, which JSON cannot carry")
    return str(plain)


def _plain_scalar(value: Any) -> bool | int | float | str | None:
    """Return a numpy scalar, a 0-d array or a subclass as the plain type; None for all else."""
    if isinstance(value, bool):
        return value
    for plain in (int, float, str):
        if isinstance(value, plain):
            return plain(value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        item = value.item()
        return item if isinstance(item, bool | int | float | str) else None
    return None


def checked_callback(callback: C, what: str) -> C:
    """Return a callback, or None where there is none. Raises TypeError, which says `what` it is."""
    if callback is not None and not callable(callback):
        raise TypeError(f"{what} must be a function or another callable, not {type(callback).__name__}")
    return callback


def callback_name(callback: Callable[..., Any] | None) -> str:
    """Return a name by which the user knows the callback."""
    while isinstance(callback, functools.partial):
        callback = callback.func
    name = getattr(callback, "__qualname__", None) or type(callback).__qualname__
    module = getattr(callback, "__module__", None)
    return name if module in (None, "__main__") else f"{module}.{name}"
