"""Turn what users log and return into what the wire and JSON carry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

#: Deeper than any sensible result; a structure that contains itself is caught by it.
_MAX_DEPTH = 64


def metric_values(values: Mapping[Any, Any], *, what: str = "metric") -> dict[str, float]:
    """Return the values as floats; numpy scalars and one-element tensors are understood.

    Raises TypeError that names the key whose value is not a number.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{what}s must be a dict of numbers, not {type(values).__name__}")
    return {str(key): _number(key, value, what) for key, value in values.items()}


def _number(key: Any, value: Any, what: str) -> float:
    if not isinstance(value, str | bytes | bytearray) and (hasattr(value, "__float__") or hasattr(value, "__index__")):
        try:
            # An array of one element has an item; float() of it is deprecated in numpy.
            return float(value.item() if hasattr(value, "item") else value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{what} {key!r} is not one number but {type(value).__name__}: {error}") from error
    raise TypeError(f"{what} {key!r} must be a number, not {type(value).__name__}")


def attribute_values(attributes: Mapping[Any, Any]) -> dict[str, str]:
    """Return the attributes as strings. Raises TypeError when they are not a mapping."""
    if not isinstance(attributes, Mapping):
        raise TypeError(f"attributes must be a dict, not {type(attributes).__name__}")
    return {str(key): value if isinstance(value, str) else str(value) for key, value in attributes.items()}


def json_value(value: Any, *, path: str, _depth: int = 0) -> Any:
    """Return `value` with numpy scalars turned into Python's own, checked to be JSON-serialisable.

    Raises TypeError that names the place, starting from `path`, of what JSON cannot carry.
    """
    if _depth > _MAX_DEPTH:
        raise TypeError(f"{path[:80]}... is nested more than {_MAX_DEPTH} deep, or contains itself")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {
            _json_key(key, path): json_value(item, path=f"{path}[{key!r}]", _depth=_depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [json_value(item, path=f"{path}[{at}]", _depth=_depth + 1) for at, item in enumerate(value)]
    plain = _plain_scalar(value)
    if plain is not None:
        return plain
    hint = "; call .tolist() on it" if hasattr(value, "tolist") else ""
    raise TypeError(f"{path} is of type {type(value).__name__}, which JSON cannot carry{hint}")


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


def callback_name(callback: Callable[..., Any]) -> str:
    """Return a name by which the user knows the callback."""
    name = getattr(callback, "__qualname__", None) or type(callback).__qualname__
    module = getattr(callback, "__module__", None)
    return name if module in (None, "__main__") else f"{module}.{name}"
