"""Stored, deflated, or whichever a sample speaks for; with isal and without it."""

import io
import os
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaleout_mp.model import ScaleoutModel, ScaleoutModelBuilder, checksums, deflate
from scaleout_mp.model.deflate import AUTO_FROM, SAMPLE, BlockDeflater, sample_of, saves
from scaleout_mp.model.memfd import MemoryFile

RANDOM = np.random.default_rng(3)
NOISE = (RANDOM.standard_normal(1_000_000, dtype=np.float32) * 0.02).astype(np.float32)
relaxed = settings(deadline=None)


@pytest.fixture(params=["isal", "zlib"])
def library(request, monkeypatch):
    if request.param == "isal":
        pytest.importorskip("isal")
    else:
        monkeypatch.setattr(deflate, "fast_zlib", lambda: None)
        monkeypatch.setattr(checksums, "fast_zlib", lambda: None)
    return request.param


def method(model: ScaleoutModel, name: str = "training_model.bin") -> int:
    with zipfile.ZipFile(model.get_file_stream()) as archive:
        assert archive.testzip() is None
        return archive.getinfo(name).compress_type


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([NOISE], zipfile.ZIP_STORED),
        ([np.zeros(10, np.float32), NOISE, np.zeros(10, np.float32)], zipfile.ZIP_STORED),
        ([np.zeros(1_000_000, np.float32)], zipfile.ZIP_DEFLATED),
        ([NOISE.astype(np.float16).astype(np.float32)], zipfile.ZIP_DEFLATED),
        ([np.zeros(2_000_000, np.float32), NOISE], zipfile.ZIP_DEFLATED),
        ([np.zeros(AUTO_FROM // 4 - 1, np.float32)], zipfile.ZIP_STORED),
        ([np.zeros(AUTO_FROM // 4, np.float32)], zipfile.ZIP_DEFLATED),
        ([NOISE.reshape(1000, 1000)[:, ::2]], zipfile.ZIP_STORED),
        ([np.zeros((1000, 1000), np.float32)[:, ::2]], zipfile.ZIP_DEFLATED),
        ([NOISE.repeat(16)[::16]], zipfile.ZIP_STORED),
        ([np.zeros(16_000_000, np.float32)[::2]], zipfile.ZIP_DEFLATED),
        ([np.zeros((1, 16_000_000), np.float32)[:, ::2], NOISE], zipfile.ZIP_DEFLATED),
        ([NOISE.repeat(16).reshape(1, -1)[:, ::2], np.zeros(100)], zipfile.ZIP_DEFLATED),
        ([], zipfile.ZIP_STORED),
    ],
)
def test_a_sample_decides(library, weights, expected):
    with ScaleoutModel.from_training_model(weights) as model:
        assert method(model) == expected
        loaded = model.get_training_model()
        assert all(map(np.array_equal, loaded, weights))


def test_each_entry_is_judged_by_itself(library):
    builder = ScaleoutModelBuilder.from_training_model([NOISE])
    model = builder.set_inference_model(bytes(AUTO_FROM), "onnx").set_file("noise", NOISE.tobytes()).build()
    assert method(model) == zipfile.ZIP_STORED
    assert method(model, "inference_model.bin") == zipfile.ZIP_DEFLATED
    assert method(model, "files/noise") == zipfile.ZIP_STORED
    assert model.get_file("noise") == NOISE.tobytes()
    with model.get_inference_model_stream() as stream:
        assert stream.read() == bytes(AUTO_FROM)


class Dribble:
    """A helper that knows nothing of archives and uses one buffer again and again."""

    name = "dribble"

    def save(self, weights, target, /):
        buffer = bytearray()
        for start in range(0, len(weights), 70_000):
            buffer[:] = weights[start : start + 70_000]
            assert target.write(memoryview(buffer)) == len(buffer)
        assert target.tell() == len(weights)

    def load(self, source, /):
        return source.read()


@pytest.mark.parametrize("compression", ["auto", "stored", "deflate"])
@pytest.mark.parametrize("content", [NOISE.tobytes(), bytes(3_000_000), b"", b"short", bytes(SAMPLE)])
def test_any_helper_is_compressed(library, compression, content):
    helper = Dribble()
    with ScaleoutModel.from_training_model(content, helper, compression=compression, checksum=True) as model:
        assert model.get_training_model() == content
        wanted = {"stored": zipfile.ZIP_STORED, "deflate": zipfile.ZIP_DEFLATED}
        chosen = zipfile.ZIP_DEFLATED if content.count(0) >= AUTO_FROM else zipfile.ZIP_STORED
        assert method(model) == wanted.get(compression, chosen)
        with ScaleoutModel.from_stream(model.get_file_stream()) as loaded:
            assert loaded.checksum == model.checksum


@relaxed
@given(
    st.lists(st.integers(0, 1 << 20).map(lambda size: os.urandom(size // 8) * 8), max_size=5),
    st.sampled_from([1, 2, 3]),
)
def test_blocks_make_one_stream(pieces, threads):
    emitted = bytearray()
    deflater = BlockDeflater(lambda *parts: emitted.extend(b"".join(parts)), threads=threads)
    for piece in pieces:
        changing = bytearray(piece)
        deflater.write(memoryview(changing))
        changing[:] = bytes(len(changing))
    deflater.finish()
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    assert inflater.decompress(bytes(emitted)) == b"".join(pieces)
    assert inflater.eof
    assert not inflater.unused_data


def test_large_pieces_are_deflated_by_threads_and_those_end(library):
    import threading

    before = threading.active_count()
    with ScaleoutModel.from_training_model([NOISE, NOISE], compression="deflate") as model:
        assert all(np.array_equal(array, NOISE) for array in model.get_training_model())
    assert threading.active_count() == before


def test_without_another_thread_it_goes_on_with_one(monkeypatch):
    import threading

    def refuse(_self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with ScaleoutModel.from_training_model([NOISE], compression="deflate", checksum=True) as model:
        assert np.array_equal(model.get_training_model()[0], NOISE)


@relaxed
@given(st.lists(st.binary(max_size=40_000), max_size=30))
def test_samples_are_bounded_and_cover_what_is_small(buffers):
    views = [memoryview(buffer) for buffer in buffers]
    pieces = sample_of(views)
    total = sum(map(len, buffers))
    taken = sum(map(len, pieces))
    assert taken <= SAMPLE + (1 << 14)
    if total <= 1 << 14:
        assert taken == total or len([buffer for buffer in buffers if buffer]) > 1
    saves(pieces)


def test_the_checksum_is_computed_on_the_way(library):
    weights = [NOISE, np.arange(10), NOISE[::2], np.asfortranarray(NOISE.reshape(1000, 1000))]
    builder = ScaleoutModelBuilder.from_training_model(weights).set_file("noise", NOISE.tobytes())
    with builder.build(compression="stored", checksum=True) as model:
        assert model._container.source._sha256 is not None
        with ScaleoutModel.from_stream(model.get_file_stream()) as copied:
            assert copied.checksum == model.checksum
        with model.to_builder().set_file("more", b"x").build(checksum=True) as more:
            assert more._container.source._sha256 is not None
            with ScaleoutModel.from_stream(more.get_file_stream()) as copied:
                assert copied.checksum == more.checksum
    deflated = builder.build(compression="deflate", checksum=True)
    with deflated, ScaleoutModel.from_stream(deflated.get_file_stream()) as copied:
        assert copied.checksum == deflated.checksum


def test_a_patch_makes_the_running_checksum_worthless():
    with MemoryFile(hashing=True) as file:
        file.write(b"head" + bytes(1 << 20))
        file.patch(0, b"HEAD")
        with file.seal() as memory, MemoryFile() as other:
            other.write(memory.view())
            assert other.seal().sha256() == memory.sha256()


def test_large_arrays_that_do_not_lie_in_one_piece_are_gathered_in_blocks(monkeypatch):
    from scaleout_mp.model import npz

    monkeypatch.setattr(npz, "_GATHER_AT_ONCE", 1000)
    strided = np.arange(60_000, dtype=np.float64).reshape(10, 300, 20)[::2, ::3, ::-1]
    records = np.zeros((50, 50), [("a", "<f4"), ("b", "<i8")])[:, ::2]
    records["b"] = np.arange(records.size).reshape(records.shape)
    times = np.arange(4000).astype("M8[s]").reshape(40, 100)[:, ::2]
    for compression in ("stored", "deflate"):
        with ScaleoutModel.from_training_model([strided, records, times], compression=compression) as model:
            loaded = model.get_training_model()
            with np.load(io.BytesIO(model.get_training_model_stream().read())) as reference:
                for index, array in enumerate((strided, records, times)):
                    assert np.array_equal(loaded[index], array)
                    assert np.array_equal(reference[str(index)], array)
                    assert loaded[index].dtype == array.dtype


def test_isal_is_loaded_for_large_models_only():
    code = (
        "import sys, numpy as np\n"
        "from scaleout_mp.model import ScaleoutModel\n"
        "model = ScaleoutModel.from_training_model([np.arange(100)])\n"
        "model.get_training_model(); model.verify(); model.to_builder().set_model_id('x').build().checksum\n"
        "assert 'isal' not in sys.modules and 'concurrent.futures.thread' not in sys.modules\n"
        "ScaleoutModel.from_training_model([np.zeros(1 << 20)], compression='stored')\n"
        "print('isal' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(checksums.fast_zlib() is not None)
