"""Federated averaging: the mean of the clients' models, weighted by how many examples each trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from scaleout_mp.errors import ModelFormatError
from scaleout_mp.model import ScaleoutModel, get_helper

if TYPE_CHECKING:
    from pathlib import Path

#: Kinds of dtypes that an average understands: bool, int, uint, float, complex.
_NUMBERS: Final = "biufc"
#: More would overflow when weights are added up.
_MOST_EXAMPLES: Final = 1e300
_DEFAULT_HELPER: Final = "numpyhelper"

#: What belongs to one model alone and is not carried over to the next.
_OWN_METADATA: Final = frozenset({"model_id", "inference_model_format"})


def helper_name(model: ScaleoutModel) -> str:
    """Return the name of the helper that reads a model's weights."""
    return str(model.metadata.get("helper_type") or _DEFAULT_HELPER)


def num_examples(meta: Mapping[str, Any]) -> float:
    """Return the weight of an update by its meta; ValueError when it has none that counts."""
    training = meta.get("training_metadata")
    value = training.get("num_examples") if isinstance(training, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MOST_EXAMPLES:
        raise ValueError(f"training_metadata.num_examples must be a number above 0, not {repr(value)[:80]}")
    return value


class FedAvg:
    """An average that grows by one update at a time; besides it, only that update is in memory.

    The sum is kept in double precision at least, whatever the model's own types: half precision and whole numbers
    would overflow on the way. Booleans are masks, not weights: they stay as the current model has them.

    Methods block on disk and arithmetic: call them on a thread, one at a time.
    """

    def __init__(self, current: ScaleoutModel) -> None:
        """Average updates of `current`, whose shapes they must have."""
        self._helper: Any = get_helper(helper_name(current))
        self._metadata = {key: value for key, value in current.metadata.items() if key not in _OWN_METADATA}
        weights = current.get_training_model(self._helper)
        self._is_list = not isinstance(weights, np.ndarray)
        arrays = _arrays(weights)
        for index, array in enumerate(arrays):
            if array.dtype.kind not in _NUMBERS:
                raise ModelFormatError(f"the model's weights {index} are of type {array.dtype}, not numbers")
        self._shapes = [array.shape for array in arrays]
        self._dtypes = [array.dtype for array in arrays]
        self._masks = {index: array.copy() for index, array in enumerate(arrays) if array.dtype.kind == "b"}
        self._sums: list[np.ndarray[Any, Any]] = []
        #: Examples of all updates so far.
        self.total_examples: float = 0

    def add(self, path: Path, examples: float) -> None:
        """Take in the update in a model file; ModelFormatError when it does not fit, and then nothing has changed."""
        with ScaleoutModel.from_file(path) as model:
            arrays = _arrays(model.get_training_model(self._helper))
            self._check(arrays)
            total = self.total_examples + examples
            part = examples / total
            if self._sums:
                self._check_sums(arrays, part)
                for mean, array in zip(self._sums, arrays, strict=True):
                    np.add(mean, _step(mean, array, part), out=mean)
            else:
                # Copies: the update's arrays end with its file.
                self._sums = [
                    array.astype(_wide(dtype), copy=True) for array, dtype in zip(arrays, self._dtypes, strict=True)
                ]
            self.total_examples = total

    def result(self) -> ScaleoutModel:
        """Return the average as a new model with a fresh id and the metadata of the current one.

        Raises ModelFormatError when it is not finite.
        """
        if not self._sums:
            raise ValueError("there is nothing to average")
        weights = [
            self._masks[index] if index in self._masks else _cast(mean, dtype)
            for index, (mean, dtype) in enumerate(zip(self._sums, self._dtypes, strict=True))
        ]
        if not all(np.isfinite(array).all() for array in weights):
            raise ModelFormatError("the average is not finite")
        return ScaleoutModel.from_training_model(
            weights if self._is_list else weights[0], helper=self._helper, metadata=self._metadata
        )

    def _check(self, arrays: Sequence[np.ndarray[Any, Any]]) -> None:
        shapes = [array.shape for array in arrays]
        if shapes != self._shapes:
            raise ModelFormatError(f"its weights have the shapes {_brief(shapes)}, not {_brief(self._shapes)}")
        for index, (array, dtype) in enumerate(zip(arrays, self._dtypes, strict=True)):
            if array.dtype.kind != dtype.kind:
                raise ModelFormatError(f"its weights {index} are of type {array.dtype}, not {dtype}")
            # One NaN would spread to the whole network and stay; a client in double precision may exceed the model's.
            with np.errstate(over="ignore"):
                if dtype.kind in "fc" and not np.isfinite(array.astype(dtype, copy=False)).all():
                    raise ModelFormatError(f"its weights {index} are not all finite")

    def _check_sums(self, arrays: Sequence[np.ndarray[Any, Any]], part: float) -> None:
        """Refuse an update that would overflow a sum that is no wider than the model's own type."""
        for index, (mean, array, dtype) in enumerate(zip(self._sums, arrays, self._dtypes, strict=True)):
            if mean.dtype == dtype and not np.isfinite(mean + _step(mean, array, part)).all():
                raise ModelFormatError(f"its weights {index} are too large to be averaged")


def _wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.result_type(dtype, np.float64)


def _step(mean: np.ndarray[Any, Any], array: np.ndarray[Any, Any], part: float) -> np.ndarray[Any, Any]:
    """Return by how much an update that is `part` of the whole moves the mean."""
    with np.errstate(over="ignore", invalid="ignore"):
        step: np.ndarray[Any, Any] = np.subtract(array, mean, dtype=mean.dtype)
        step *= part
    return step


def _cast(mean: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Keep the types of the model: a client that trains in float64 must not double it. Whole numbers are rounded."""
    if dtype.kind not in "iu":
        with np.errstate(over="ignore"):
            return mean.astype(dtype)
    bounds = np.iinfo(dtype)
    rounded = np.rint(mean)
    # The largest whole numbers of 64 bits are no doubles: the next double above would wrap.
    top, bottom = rounded >= float(bounds.max), rounded <= float(bounds.min)
    whole = np.where(top | bottom, 0, rounded).astype(dtype)
    whole[top], whole[bottom] = bounds.max, bounds.min
    return whole


def _arrays(weights: Any) -> list[np.ndarray[Any, Any]]:
    return [weights] if isinstance(weights, np.ndarray) else [np.asarray(array) for array in weights]


def _brief(shapes: Sequence[tuple[int, ...]]) -> str:
    text = ", ".join(str(shape) for shape in shapes[:8])
    return f"[{text}{', ...' if len(shapes) > 8 else ''}]"
