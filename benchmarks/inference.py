"""What a request to a staged model costs, beside a pool with one process, each side on one core."""

from __future__ import annotations

import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.harness import Row, alone, beside, compare, interleaved
from benchmarks.one_worker import REQUESTS, SIZE, measure, on_one_core
from benchmarks.one_worker import infer as answer
from benchmarks.tasks import ask, peer
from scaleout_mp import EdgeClient, GrpcEdgeClientRuntime, ScaleoutModel
from scaleout_mp.config import Settings

if TYPE_CHECKING:
    import subprocess

POOL = "ProcessPoolExecutor(1)"


def infer(_model: ScaleoutModel, parameters: dict[str, Any]) -> dict[str, Any]:
    return answer(parameters)


def inference(runs: int = 5) -> list[Row]:
    """Small requests one after the other, and 100 MB into the callback."""
    with peer("benchmarks.inference", "small") as ours, peer("benchmarks.one_worker", "small") as theirs:
        mine, peers = [], []
        for _ in range(runs):
            mine.append(_figures(ours))
            peers.append(_figures(theirs))
    with peer("benchmarks.inference", "large") as ours, peer("benchmarks.one_worker", "large") as theirs:
        large, peer_large, memcpy = interleaved(
            runs, lambda: float(ask(ours)), lambda: float(ask(theirs)), _copy_ms, times=(3, 1, 3)
        )
    small, into = "small requests to a warm model, on one core", "100 MB into the inference callback"
    return [
        alone(small, [rate for rate, _ in mine], unit="requests/s", at_least=1000),
        alone("one of them", [median for _, median in mine], unit="ms", at_most=1),
        beside("one of them", [median for _, median in mine], [median for _, median in peers], peer=POOL, unit="ms"),
        compare(into, large, "memcpy into new memory", memcpy, unit="ms", at_most=1.5),
        beside(into, large, peer_large, peer=POOL, unit="ms"),
    ]


def _figures(process: subprocess.Popen[str]) -> tuple[float, float]:
    """Return requests/s and the milliseconds of one."""
    seconds, median = map(float, ask(process).split())
    return REQUESTS / seconds, median * 1e3


_array = np.ones(SIZE, np.uint8)


def _copy_ms() -> float:
    before = time.monotonic_ns()
    _array.copy()
    return (time.monotonic_ns() - before) / 1e6


def _measure_ours() -> None:
    on_one_core()
    with tempfile.TemporaryDirectory() as folder:
        runtime = GrpcEdgeClientRuntime(settings=Settings(model_cache_dir=folder))
        client = EdgeClient(runtime=runtime)
        client.set_inference_callback(infer)
        with client.stage_model(ScaleoutModel.from_training_model([np.zeros(10)])) as model:
            model_id = model.model_id
        assert model_id is not None
        measure(sys.argv[1], lambda parameters: client.run_inference(model_id, parameters))
        client.close()


if __name__ == "__main__":
    _measure_ours()
