"""What becomes of the result of `scaleout-mp run`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import stat
import tempfile
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from scaleout_mp.errors import ConfigError
from scaleout_mp.model import ScaleoutModel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

_KINDS: Final = (".scm", ".npz", ".json")
#: Items of the largest array that is shown.
_LISTED: Final = 16
#: What there is to be shown beside a model that was returned alone.
_NOTHING: Final = object()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """A result, ready to be shown."""

    #: What there is beside the model or the arrays, as JSON has it.
    shown: Any
    #: Where it went; None: nowhere.
    path: str | None = None
    #: Why it did not go there.
    problem: str | None = None


def check_output(path: Path) -> None:
    """Raise ConfigError when a result could not go there: before the work, not after it."""
    if path.suffix not in _KINDS:
        raise ConfigError(f"--output {path}: its name must end in {', '.join(_KINDS[:-1])} or {_KINDS[-1]}")
    folder = path.parent
    # Of os.path: where a folder above is closed to this user, pathlib raises.
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ConfigError(f"--output {path}: no file can be written there")


def keep_result(value: Any, path: Path | None) -> Kept:
    """Write a result to `path`, if there is one, and return what is to be shown of it."""
    model, arrays, rest = _split(value)
    shown = None if rest is _NOTHING else _plain(rest)
    try:
        if path is None:
            return Kept(shown=shown)
        if path.suffix == ".json":
            problem = _write_json(path, rest if arrays is None else value)
            return Kept(shown=shown, path=None if problem else str(path), problem=problem)
        if not _write(path, model, arrays):
            kind = type(value).__name__
            return Kept(shown=shown, problem=f"{path} takes a model or arrays; the function returned a {kind}")
        return Kept(shown=shown, path=str(path))
    except OSError as error:
        return Kept(shown=shown, problem=f"{path}: {error.strerror or error}")
    finally:
        if model is not None:
            model.close()


def _split(value: Any) -> tuple[ScaleoutModel | None, Mapping[str, np.ndarray[Any, Any]] | None, Any]:
    """Return model, arrays and what remains to be shown."""
    if isinstance(value, ScaleoutModel):
        return value, None, _NOTHING
    if isinstance(value, tuple | list) and value and isinstance(value[0], ScaleoutModel):
        rest = value[1:]
        return value[0], None, rest[0] if len(rest) == 1 else list(rest)
    arrays = _arrays(value)
    return None, arrays, None if arrays is not None else value


def _arrays(value: Any) -> Mapping[str, np.ndarray[Any, Any]] | None:
    if isinstance(value, np.ndarray):
        return {"arr_0": value}
    if isinstance(value, tuple | list) and value and all(isinstance(item, np.ndarray) for item in value):
        return {f"arr_{index}": item for index, item in enumerate(value)}
    if isinstance(value, dict) and value and all(isinstance(item, np.ndarray) for item in value.values()):
        return {str(key): item for key, item in value.items()}
    return None


def _write_json(path: Path, value: Any) -> str | None:
    """Write a value with all of its arrays; say why it is not written."""
    if value is _NOTHING:
        return f"{path} takes what JSON has; the function returned a model"
    text = json.dumps(_plain(value, listed=None), indent=2)
    _replace(path, lambda file: file.write(text.encode() + b"\n"))
    return None


def _write(path: Path, model: ScaleoutModel | None, arrays: Mapping[str, np.ndarray[Any, Any]] | None) -> bool:
    """Write what there is; False when there is nothing that such a file takes."""
    if path.suffix == ".scm":
        if model is not None:
            model.save_to_file(path)
            return True
        if arrays is None:
            return False
        with ScaleoutModel.from_training_model(list(arrays.values())) as made:
            made.save_to_file(path)
        return True
    if model is not None:
        arrays = _arrays(model.get_training_model())
    if arrays is None:
        return False
    found = arrays
    _replace(path, lambda file: np.savez(file, **found))  # type: ignore[arg-type]  # names are free
    return True


def _replace(path: Path, write: Callable[[Any], object]) -> None:
    """Write a file whole, or leave the one that is there; what is no plain file is written to. Raises OSError."""
    target = os.path.realpath(path)
    if os.path.exists(target) and not stat.S_ISREG(os.stat(target).st_mode):
        with open(target, "wb") as file:
            write(file)
        return
    descriptor, beside = tempfile.mkstemp(dir=os.path.dirname(target), prefix=f".{path.name}-")
    try:
        with open(descriptor, "wb") as file:
            write(file)
        # As `open` would have made it.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(beside, 0o666 & ~mask)
        os.replace(beside, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def _plain(value: Any, *, listed: int | None = _LISTED) -> Any:
    """Return a value as JSON has it; what JSON lacks becomes null, or a text that says what it was.

    So do arrays of more than `listed` items; None: of no size.
    """
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item, listed=listed) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, listed=listed) for item in value]
    if isinstance(value, np.ndarray):
        fits = listed is None or value.size <= listed
        return _plain(value.tolist(), listed=listed) if fits else f"<array {value.dtype} {value.shape}>"
    return f"<{type(value).__name__}>" if not isinstance(value, bytes) else f"<{len(value)} bytes>"
