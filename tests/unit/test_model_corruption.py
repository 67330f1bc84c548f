"""Damaged and hostile models: a ModelError or the same model, never anything else, and never much memory."""

import contextlib
import functools
import io
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scaleout_mp.errors import ModelError, ModelFormatError
from scaleout_mp.model import ContainerLimits, ScaleoutModel, SealedMemory
from scaleout_mp.model.container import Container


def load(data: bytes) -> ScaleoutModel:
    return ScaleoutModel.from_stream(io.BytesIO(data))


VALID = {
    compression: ScaleoutModel.from_training_model(
        [np.arange(50, dtype=np.float32), np.ones((3, 3))], metadata={"k": "v"}, compression=compression
    )
    .get_file_stream()
    .read()
    for compression in ("stored", "deflate")
}


def outcome(data: bytes):
    """What a receiver that was told the format gets to see: the same model, or a ModelError."""
    try:
        with SealedMemory.of(data) as memory:
            container = Container(memory)
            container.verify()
            container.content("training_model.bin")
        with load(data) as model:
            return model.metadata, [array.tolist() for array in model.get_training_model()]
    except ModelError:
        return None


def test_what_is_not_damaged_is_read():
    for data in VALID.values():
        metadata, arrays = outcome(data)
        assert metadata["k"] == "v"
        assert arrays == [list(range(50)), [[1.0] * 3] * 3]


fuzz = settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)


@pytest.mark.parametrize("compression", VALID)
@fuzz
@given(data=st.data())
def test_flipped_bits_are_found(compression, data):
    valid = VALID[compression]
    damaged = bytearray(valid)
    for position in data.draw(st.lists(st.integers(0, 8 * len(valid) - 1), min_size=1, max_size=4, unique=True)):
        damaged[position // 8] ^= 1 << position % 8
    assert outcome(bytes(damaged)) in (None, outcome(valid))


@pytest.mark.parametrize("compression", VALID)
@fuzz
@given(data=st.data())
def test_cuts_and_splices_are_found(compression, data):
    valid = VALID[compression]
    first, second = sorted(data.draw(st.tuples(*[st.integers(0, len(valid))] * 2)))
    insert = data.draw(st.binary(max_size=40))
    assert outcome(valid[:first]) is None or first == len(valid)
    assert outcome(valid[:first] + insert + valid[second:]) in (None, outcome(valid))


OTHER = [
    ScaleoutModel.from_training_model([np.full(30, 7.0), np.zeros(2, np.int8)], metadata={"k": "w"}, compression=kind)
    .get_file_stream()
    .read()
    for kind in ("stored", "deflate")
]


@pytest.mark.parametrize("compression", VALID)
@fuzz
@given(data=st.data())
def test_splices_of_two_models_are_found(compression, data):
    valid, other = VALID[compression], data.draw(st.sampled_from(OTHER))
    cut = data.draw(st.integers(0, len(valid)))
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(other))] * 2)))
    pieces = data.draw(st.permutations([valid[:cut], other[start:end], valid[cut:]]))
    assert outcome(b"".join(pieces)) in (None, outcome(valid), outcome(other))


METADATA = b'{"model_id": "m", "helper_type": "numpyhelper"}'


def nested(inner: bytes, method: int, metadata: bytes = METADATA) -> bytes:
    """A container as released writers make it, or with the outer layer stored."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        archive.writestr("metadata.json", metadata, zipfile.ZIP_DEFLATED)
        archive.writestr("training_model.bin", inner)
    return target.getvalue()


def many_entries(limit: int) -> bytes:
    entries = io.BytesIO()
    with zipfile.ZipFile(entries, "w") as archive:
        for index in range(limit // 100):
            archive.writestr(zipfile.ZipInfo(str(index)), b"")
    return entries.getvalue()


def many_arrays(_: int) -> bytes:
    npz = io.BytesIO()
    np.savez_compressed(npz, **{str(index): np.zeros(0) for index in range(1000)})
    return nested(npz.getvalue(), zipfile.ZIP_DEFLATED)


def arrays_that_swell(limit: int, method: int) -> bytes:
    npz = io.BytesIO()
    np.savez_compressed(npz, **{str(index): np.zeros(limit // 4, np.uint8) for index in range(16)})
    return nested(npz.getvalue(), method)


def noise_in_both_layers(limit: int) -> bytes:
    npz = io.BytesIO()
    np.savez_compressed(npz, **{"0": np.random.default_rng(0).integers(0, 256, limit // 2, np.uint8)})
    return nested(npz.getvalue(), zipfile.ZIP_DEFLATED)


#: Makers of models that are small until they are opened.
BOMBS = {
    "many entries": many_entries,
    "arrays": functools.partial(arrays_that_swell, method=zipfile.ZIP_STORED),
    "arrays in a deflated entry": functools.partial(arrays_that_swell, method=zipfile.ZIP_DEFLATED),
    "an entry": lambda limit: nested(bytes(8 * limit), zipfile.ZIP_DEFLATED),
    "many arrays": many_arrays,
    "metadata": lambda limit: nested(b"", zipfile.ZIP_STORED, b'{"a": [' + b"[]," * limit + b"0]}"),
    "both layers": noise_in_both_layers,
}


def use(memory: SealedMemory, limits: ContainerLimits) -> None:
    with contextlib.suppress(ModelFormatError), ScaleoutModel.from_memory(memory, limits=limits) as model:
        model.verify()
        model.get_training_model()


@pytest.mark.parametrize("name", BOMBS)
def test_memory_stays_within_twice_the_limit(name):
    limit = 8 << 20
    data = BOMBS[name](limit)
    assert len(data) <= limit
    memory = SealedMemory.of(data)
    limits = ContainerLimits(max_size=limit, max_inflated=limit, max_arrays=500, max_metadata=1 << 16)
    tracemalloc.start()
    try:
        use(memory, limits)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak + len(data) < 2 * limit
