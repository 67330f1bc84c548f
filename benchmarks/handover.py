"""How a model gets from the store into a task: time, and whose memory it takes."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks.harness import Row, alone, compare, interleaved
from scaleout_mp import ScaleoutModel, TaskExecutor
from scaleout_mp.model import ModelStore

GIGABYTE = 10**9


def weights(size: int = GIGABYTE) -> list[np.ndarray[Any, Any]]:
    """Ten float32 arrays of `size` bytes in all, of values that do not compress."""
    generator = np.random.default_rng(0)
    return [generator.random(size // 40, dtype=np.float32) for _ in range(10)]


def arrays_at(model: ScaleoutModel) -> int:
    """Return the moment at which the arrays are there, untouched."""
    arrays = model.get_training_model()
    now = time.monotonic_ns()
    assert not any(array.flags.writeable for array in arrays)
    return now


def pickled_at(arrays: list[np.ndarray[Any, Any]]) -> int:
    assert len(arrays) == 10
    return time.monotonic_ns()


def own_memory(model: ScaleoutModel) -> float:
    """Return the bytes of private memory that reading the whole model cost."""
    before = _status("RssAnon:")
    for array in model.get_training_model():
        array.sum()
    return _status("RssAnon:") - before


def _status(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def handover(runs: int = 5) -> list[Row]:
    """A model of 1 GB from the store into the task's read-only arrays, before they are touched."""
    spawn = multiprocessing.get_context("spawn")
    arrays = weights()
    with (
        tempfile.TemporaryDirectory() as folder,
        TaskExecutor() as executor,
        concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool,
    ):
        store = ModelStore(folder)
        with ScaleoutModel.from_training_model(arrays, compression="stored") as model:
            model_id = model.model_id
            assert model_id is not None
            store.put(model)
        pool.submit(pickled_at, [np.zeros(1)] * 10).result()
        executor.submit(own_memory, store.get(model_id)).result()

        def ours() -> float:
            before = time.monotonic_ns()
            with store.get(model_id) as stored:
                return (executor.submit(arrays_at, stored).result() - before) / 1e6

        def theirs() -> float:
            before = time.monotonic_ns()
            return (pool.submit(pickled_at, arrays).result() - before) / 1e6

        private = executor.submit(own_memory, store.get(model_id)).result() / 1e6
        mine, peers = interleaved(runs, ours, theirs, times=(9, 1))
    return [
        alone("1 GB model, store to arrays of a new task", mine, unit="ms", at_most=5),
        compare("1 GB model, into the process", mine, "ProcessPoolExecutor", peers, unit="ms", at_least=500),
        alone("private memory of a task that reads it all", [private], unit="MB", at_most=20),
    ]


def supervisor_peak() -> list[Row]:
    """How far the supervisor's memory grows while a task reads a 1 GB model and returns another."""
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.handover"], check=True, capture_output=True, text=True, env={**os.environ}
    )
    return [alone("supervisor's growth, 1 GB in and 1 GB back", [float(result.stdout)], unit="models", at_most=1.2)]


def make_another(model: ScaleoutModel) -> ScaleoutModel:
    return ScaleoutModel.from_training_model([array * 2 for array in model.get_training_model()], compression="stored")


def _measure_peak() -> None:
    with tempfile.TemporaryDirectory() as folder, TaskExecutor() as executor:
        store = ModelStore(folder)
        # In a task: this process must not have had it in its memory.
        with executor.submit(
            lambda: ScaleoutModel.from_training_model(weights(), compression="stored")
        ).result() as seed:
            store.put(seed)
            model_id, size = seed.model_id, seed.size
        assert model_id is not None
        # From here on: proc(5), clear_refs 5 sets the peak to what is resident now.
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
        before = _status("VmHWM:")
        with store.get(model_id) as model, executor.submit(make_another, model).result() as returned:
            assert returned.size > GIGABYTE
        growth = _status("VmHWM:") - before
    print(growth / size)


if __name__ == "__main__":
    _measure_peak()
