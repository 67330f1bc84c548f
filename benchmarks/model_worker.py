"""Does one operation on models after the other, as its standard input says, and answers how many milliseconds it took.

    model_worker.py ours|scaleoututil MEGABYTES FOLDER

Runs in an environment of its own, so it imports nothing of this folder. Both packages get the same arrays, and find
their temporary files in the same file system.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

ARRAYS = 10


def weights(megabytes: int) -> list[np.ndarray[Any, Any]]:
    """Float32 arrays as a trained layer has them: normally distributed, with a deviation of 0.02."""
    generator = np.random.default_rng(0)
    count = megabytes * 10**6 // 4 // ARRAYS
    return [generator.standard_normal(count, dtype=np.float32) * np.float32(0.02) for _ in range(ARRAYS)]


class Worker:
    """The operations. What is not part of one, such as closing its model, is not timed."""

    def __init__(self, package: str, arrays: list[np.ndarray[Any, Any]], folder: str) -> None:
        self.package = package
        self.arrays = arrays
        self.folder = folder
        if package == "ours":
            from scaleout_mp.model import ScaleoutModel, get_helper

            self.model: Any = ScaleoutModel
            self.stored = functools.partial(ScaleoutModel.from_training_model, arrays, compression="stored")
        else:
            from scaleoututil.helpers.helpers import get_helper
            from scaleoututil.utils.model import ScaleoutModel

            self.model = ScaleoutModel
            self.stored = functools.partial(ScaleoutModel.from_training_model, arrays, get_helper("numpyhelper"))

    def path(self, name: str) -> str:
        """Return where a file lies."""
        return os.path.join(self.folder, f"{name}.scm")

    def save(self) -> float:
        """Leave a file for the other operations, and return its size in bytes."""
        self.stored().save_to_file(self.path(self.package))
        return float(os.path.getsize(self.path(self.package)))

    def build(self) -> float:
        """Build, without compression where there is a choice."""
        return timed(self.stored)

    def auto(self) -> float:
        """Build as a user does who says nothing of compression."""
        return timed(lambda: self.model.from_training_model(self.arrays))

    def deflate(self) -> float:
        """Build with compression."""
        return timed(lambda: self.model.from_training_model(self.arrays, compression="deflate"))

    def deflated_size(self) -> float:
        """Return the size of a deflated model in bytes."""
        return float(self.model.from_training_model(self.arrays, compression="deflate").size)

    def build_and_checksum(self) -> float:
        """Build, and know the checksum."""
        options = {"checksum": True} if self.package == "ours" else {}

        def both() -> Any:
            model = self.stored(**options)
            assert model.checksum
            return model

        return timed(both)

    def load(self, name: str = "") -> float:
        """Open a file and touch every page of every array."""

        def touch() -> Any:
            model = self.model.from_file(self.path(name or self.package))
            arrays = model.get_training_model()
            assert len(arrays) == ARRAYS
            assert all(np.isfinite(array[::1024].sum()) for array in arrays)
            return model, arrays

        return timed(touch)

    def load_ours(self) -> float:
        """Open our file."""
        return self.load("ours")

    def new_id(self) -> float:
        """Give a model that was just built another id."""
        model = self._built
        return timed(lambda: model.to_builder().set_model_id("another").build())

    def new_id_of_file(self) -> float:
        """Give a model that lies in a file another id."""
        model = self.model.from_file(self.path(self.package))
        return timed(lambda: model.to_builder().set_model_id("another").build())

    def checksum(self) -> float:
        """Hash a file."""
        model = self.model.from_file(self.path(self.package))
        return timed(lambda: model.checksum)

    def chunks(self) -> float:
        """Stream a model as messages."""
        model = self._built
        return timed(lambda: sum(len(chunk.data) for chunk in model.get_filechunk_stream()))

    @functools.cached_property
    def _built(self) -> Any:
        return self.stored()


def timed(operation: Callable[[], Any]) -> float:
    """Return the milliseconds until `operation` has returned; what it returned goes afterwards."""
    before = time.perf_counter()
    result = operation()
    took = (time.perf_counter() - before) * 1e3
    del result
    return took


def main() -> None:
    package, megabytes, folder = sys.argv[1:]
    worker = Worker(package, weights(int(megabytes)), folder)
    print("ready", flush=True)
    for line in sys.stdin:
        print(getattr(worker, line.strip())(), flush=True)


if __name__ == "__main__":
    main()
