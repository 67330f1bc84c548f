"""Federated averaging: the mean of the clients' models, weighted by how many examples each trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from scaleout_mp.errors import ModelFormatError
from scaleout_mp.model import ScaleoutModel, get_helper

if TYPE_CHECKING:
    from pathlib import Path

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
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"training_metadata.num_examples must be a number above 0, not {value!r}")
    return value


class FedAvg:
    """An average that grows by one update at a time; besides it, only that update is in memory.

    Methods block on disk and arithmetic: call them on a thread, one at a time.
    """

    def __init__(self, current: ScaleoutModel) -> None:
        """Average updates of `current`, whose shapes they must have."""
        self._helper: Any = get_helper(helper_name(current))
        self._metadata = {key: value for key, value in current.metadata.items() if key not in _OWN_METADATA}
        weights = _arrays(current.get_training_model(self._helper))
        self._shapes = [array.shape for array in weights]
        self._dtypes = [array.dtype for array in weights]
        self._average: Any = None
        #: Examples of all updates so far.
        self.total_examples: float = 0

    def add(self, path: Path, examples: float) -> None:
        """Take in the update in a model file; ModelFormatError when it does not fit, and then nothing has changed."""
        with ScaleoutModel.from_file(path) as model:
            weights = model.get_training_model(self._helper)
            self._check(_arrays(weights))
            total = self.total_examples + examples
            if self._average is None:
                self._average = weights
            else:
                self._average = self._helper.increment_average(self._average, weights, examples, total)
            self.total_examples = total

    def result(self) -> ScaleoutModel:
        """Return the average as a new model with a fresh id and the metadata of the current one."""
        if self._average is None:
            raise ValueError("there is nothing to average")
        return ScaleoutModel.from_training_model(
            self._cast(self._average), helper=self._helper, metadata=self._metadata
        )

    def _check(self, arrays: Sequence[np.ndarray[Any, Any]]) -> None:
        shapes = [array.shape for array in arrays]
        if shapes != self._shapes:
            raise ModelFormatError(f"its weights have the shapes {_brief(shapes)}, not {_brief(self._shapes)}")
        for index, array in enumerate(arrays):
            if array.dtype.kind not in "biufc":
                raise ModelFormatError(f"its weights {index} are of type {array.dtype}, not numbers")
            # One NaN would spread to the whole network and stay.
            if array.dtype.kind in "fc" and not np.isfinite(array).all():
                raise ModelFormatError(f"its weights {index} are not all finite")

    def _cast(self, weights: Any) -> Any:
        """Keep the floating-point types of the model: a client that trains in float64 must not double it."""
        if isinstance(weights, np.ndarray):
            return weights
        return [
            np.asarray(array).astype(dtype, copy=False) if dtype.kind == "f" else array
            for array, dtype in zip(weights, self._dtypes, strict=True)
        ]


def _arrays(weights: Any) -> list[np.ndarray[Any, Any]]:
    return [weights] if isinstance(weights, np.ndarray) else [np.asarray(array) for array in weights]


def _brief(shapes: Sequence[tuple[int, ...]]) -> str:
    text = ", ".join(str(shape) for shape in shapes[:8])
    return f"[{text}{', ...' if len(shapes) > 8 else ''}]"
