"""The id under which a task's result is filed: chosen by the supervisor, at no cost."""

from __future__ import annotations

import asyncio
import io
import os
import zipfile

import numpy as np
import pytest

from scaleout_mp import ScaleoutModel, TaskExecutor
from scaleout_mp.model.spliced import SplicedBytes
from scaleout_mp.supervisor.job_kinds import ModelUpdateJob
from scaleout_mp.wire import edge_pb2 as pb

SIZE = 5_000_000


def train(seed):
    weights = [np.random.default_rng(seed).standard_normal(SIZE, dtype=np.float32)]
    return ScaleoutModel.from_training_model(weights, metadata={"seed": seed})


def train_and_lay_out_otherwise(seed):
    """As a task can that writes its container itself: the metadata come first and are nobody's choice."""
    with train(seed) as model:
        target = io.BytesIO()
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr(
                "metadata.json", b'{"model_id": "../mine", "seed": %d, "helper_type": "numpyhelper"}' % seed
            )
            archive.writestr("training_model.bin", model.get_training_model_stream().read())
    return ScaleoutModel.from_stream(io.BytesIO(target.getvalue()))


def memory_of_this_process() -> int:
    """Return the bytes of memory files that this process holds, each counted once."""
    files = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            if "memfd:scaleout-model" in os.readlink(f"/proc/self/fd/{name}"):
                status = os.stat(f"/proc/self/fd/{name}")
                files[status.st_ino] = status.st_blocks * 512
        except FileNotFoundError:
            continue
    return sum(files.values())


async def renamed(trained: ScaleoutModel, update_id: str) -> ScaleoutModel:
    job = ModelUpdateJob(pb.TaskRequest(correlation_id="c"), None, on_start=lambda: None)
    return await job._renamed(trained, update_id)


@pytest.mark.parametrize("callback", [train, train_and_lay_out_otherwise])
def test_the_result_of_a_task_is_filed_under_the_supervisors_id(callback):
    with TaskExecutor() as executor:
        trained = executor.submit(callback, 3).result()
    before = memory_of_this_process()
    with asyncio.run(renamed(trained, "the-update")) as final:
        assert trained.closed
        assert final.model_id == "the-update"
        assert final.metadata["seed"] == 3
        data = b"".join(final.iter_chunks())
        assert len(data) == final.size > 4 * SIZE
        with ScaleoutModel.from_stream(io.BytesIO(data)) as uploaded:
            assert uploaded.checksum == final.checksum
            assert uploaded.model_id == "the-update"
            uploaded.verify()
            assert len(uploaded.get_training_model()[0]) == SIZE
        del uploaded
        if callback is train:
            assert isinstance(final._container.source, SplicedBytes)
        # No second copy has come, for the id, the checksum or the upload.
        assert memory_of_this_process() <= before + 1_000_000
