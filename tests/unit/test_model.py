"""ScaleoutModel and its builder, as users of the published package know them."""

import copy
import gc
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from scaleout_mp.errors import IncompatibleModelFormatError, ModelError, ModelFormatError
from scaleout_mp.model import ScaleoutModel, ScaleoutModelBuilder, SealedMemory, get_helper
from scaleout_mp.model.container import ContainerLimits
from scaleout_mp.model.memfd import MemoryFile
from scaleout_mp.wire.edge_pb2 import FileChunk

WEIGHTS = [np.arange(12, dtype=np.float32).reshape(3, 4), np.array([1.5, -2.5])]


def equal(first, second) -> bool:
    return len(first) == len(second) and all(map(np.array_equal, first, second))


@pytest.fixture
def model():
    with ScaleoutModel.from_training_model(WEIGHTS, metadata={"round": 3}) as built:
        yield built


def zip_of(entries: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return target.getvalue()


def test_it_is_made_by_factories_only():
    with pytest.raises(TypeError, match="from_training_model, from_file, from_stream or from_filechunk_stream"):
        ScaleoutModel()


def test_weights_come_back_as_views_of_the_memory(model):
    arrays = model.get_training_model()
    assert equal(arrays, WEIGHTS)
    memory = np.frombuffer(next(model.iter_chunks(model.size)), np.uint8)
    for array in arrays:
        assert np.shares_memory(array, memory)
        assert not array.flags.writeable
        assert array.ctypes.data % 64 == 0
        with pytest.raises(ValueError, match=r"read-only|WRITEABLE"):
            array.flags.writeable = True


def test_arrays_outlive_the_model(model):
    arrays = model.get_training_model()
    model.close()
    model.close()
    assert model.closed
    assert "closed" in repr(model)
    assert equal(arrays, WEIGHTS)
    with pytest.raises(ValueError, match="closed"):
        model.get_training_model()


def test_metadata_is_a_copy(model):
    assert model.metadata == {"round": 3, "helper_type": "numpyhelper", "model_id": model.model_id}
    model.metadata["round"] = 4
    assert model.metadata["round"] == 3
    nested = ScaleoutModel.from_training_model([], metadata={"list": [1]})
    nested.metadata["list"].append(2)
    assert nested.metadata["list"] == [1]
    assert model.format_version == 2
    assert not model.legacy_source


def test_metadata_must_be_json():
    with pytest.raises(TypeError, match="metadata must be JSON"):
        ScaleoutModel.from_training_model(WEIGHTS, metadata={"bad": object()})


def test_the_published_reader_finds_everything(model):
    with zipfile.ZipFile(model.get_file_stream()) as archive:
        assert archive.testzip() is None
        assert archive.namelist()[-1] == "metadata.json"
        with archive.open("training_model.bin") as member, np.load(member) as weights:
            assert equal([weights["0"], weights["1"]], WEIGHTS)


@pytest.mark.parametrize("compression", ["stored", "deflate"])
def test_chunk_stream_round_trip(compression):
    weights = [np.zeros(1_000_000, np.float32), np.arange(10)]
    with ScaleoutModel.from_training_model(weights, compression=compression) as model:
        messages = list(model.get_filechunk_stream())
        assert all(isinstance(message, FileChunk) for message in messages)
        assert max(len(message.data) for message in messages) <= 1 << 20
        if compression == "deflate":
            assert model.size < 10_000
        with ScaleoutModel.from_filechunk_stream(messages) as received:
            assert received.checksum == model.checksum
            assert received.metadata == model.metadata
            arrays = received.get_training_model()
            assert equal(arrays, weights)
            assert not arrays[0].flags.writeable


def test_chunks_are_views_of_any_size(model):
    pieces = list(model.iter_chunks(100))
    assert [len(piece) for piece in pieces[:-1]] == [100] * (len(pieces) - 1)
    assert hashlib.sha256(b"".join(pieces)).hexdigest() == model.checksum
    with pytest.raises(ValueError, match="positive"):
        next(model.iter_chunks(0))


def test_unknown_compression_is_refused():
    with pytest.raises(ValueError, match="stored, deflate"):
        ScaleoutModel.from_training_model(WEIGHTS, compression="best")


def test_a_file_is_used_where_it_lies(model, tmp_path):
    path = tmp_path / "model.scm"
    with ScaleoutModel.from_stream(model.get_file_stream()) as copied:
        copied.save_to_file(path)
        assert path.read_bytes() == model.get_file_stream().read()
        assert os.path.samestat(os.fstat(copied.fileno()), path.stat())
        assert copied.checksum == model.checksum
        copied.save_to_file(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.scm"]
    with ScaleoutModel.from_file(path) as loaded:
        assert os.path.samestat(os.fstat(loaded.fileno()), path.stat())
        assert loaded.metadata == model.metadata
        assert equal(loaded.get_training_model(), WEIGHTS)
    assert path.exists()
    with pytest.raises(FileNotFoundError):
        ScaleoutModel.from_file(tmp_path / "missing")


def test_a_failed_save_leaves_nothing(model, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        model.save_to_file(tmp_path / "folder")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
    assert equal(model.get_training_model(), WEIGHTS)


def test_a_link_stays_and_its_file_is_replaced(model, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real/model.scm")
    for _ in range(2):
        with model.to_builder().build() as saved:
            saved.save_to_file(os.fsencode(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(tmp_path / "real") == ["model.scm"]
    assert ScaleoutModel.from_file(tmp_path / "link").checksum == model.checksum


def test_no_file_takes_the_place_of_a_pipe_or_device(model, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match="not a regular file"):
        model.save_to_file(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]
    assert equal(model.get_training_model(), WEIGHTS)


def test_any_file_name_can_be_saved_to(model, tmp_path):
    model.save_to_file(tmp_path / ("n" * 255))
    assert os.listdir(tmp_path) == ["n" * 255]


def test_bare_weights_are_wrapped(tmp_path):
    raw = io.BytesIO()
    np.savez_compressed(raw, **{str(index): array for index, array in enumerate(WEIGHTS)})
    path = tmp_path / "seed.npz"
    path.write_bytes(raw.getvalue())
    assert ScaleoutModel.detect_format_file(path) == "legacy"
    with ScaleoutModel.from_file(path) as legacy:
        assert legacy.legacy_source
        assert set(legacy.metadata) == {"model_id"}
        assert legacy.verify_checksum(hashlib.sha256(raw.getvalue()).hexdigest())
        assert legacy.verify_checksum(legacy.checksum)
        assert not legacy.verify_checksum("0" * 64)
        assert legacy.get_training_model_stream().read() == raw.getvalue()
        assert ScaleoutModel.detect_format(legacy.get_file_stream()) == "zip"
        assert equal(legacy.get_training_model(get_helper("numpyhelper")), WEIGHTS)
        with pytest.raises(ModelFormatError, match="pass helper="):
            legacy.get_training_model()
    named = ScaleoutModelBuilder.from_file(path).set_helper_type("numpyhelper").set_model_id("given").build()
    assert named.metadata == {"model_id": "given", "helper_type": "numpyhelper"}
    assert equal(named.get_training_model(), WEIGHTS)


def test_detect_format_keeps_the_position(model):
    for data, expected in (
        (model.get_file_stream().read(), "zip"),
        (b"\0" * 100, "legacy"),
        (b"", "legacy"),
        (b"PK\x03\x04 cut off", "legacy"),
    ):
        stream = io.BytesIO(data)
        assert ScaleoutModel.detect_format(stream) == expected
        assert stream.tell() == 0


def test_checksum_and_verification(model):
    assert model.checksum == hashlib.sha256(model.get_file_stream().read()).hexdigest()
    assert model.verify_checksum(model.checksum)
    assert model.verify_checksum(model.checksum.upper())
    assert model.verify_checksum(None)
    assert not model.verify_checksum("")
    model.verify()


def test_signature(model):
    key = Ed25519PrivateKey.generate()
    signed = model.sign(key, signer_id="node-a")
    assert signed.keys() == {"algorithm", "signature", "model_id", "signer_id"}
    assert signed["model_id"] == model.model_id
    assert "signer_id" not in model.sign(key)
    public = key.public_key()
    assert model.verify_signature(public, signed)
    assert model.verify_signature(public, signed["signature"])
    assert model.to_builder().build().verify_signature(public, signed)
    assert not model.to_builder().set_model_id("other").build().verify_signature(public, signed)
    for bad in ("", "not base64!", "AAAA", {"algorithm": "rsa", "signature": signed["signature"]}, {}):
        assert not model.verify_signature(public, bad)
    # As they may come out of a file; the published package takes them as well.
    for written in (signed["signature"].encode(), signed["signature"][:76] + "\n" + signed["signature"][76:] + "\n"):
        assert model.verify_signature(public, written)
    assert not model.verify_signature(public, b"\xff")
    assert not model.verify_signature(Ed25519PrivateKey.generate().public_key(), signed)


def test_hand_over_by_descriptor(model):
    with ScaleoutModel.from_fd(model.fileno()) as received:
        model.close()
        assert equal(received.get_training_model(), WEIGHTS)
        with ScaleoutModel.from_fd(received.fileno(), verify=False) as again:
            assert again.metadata == received.metadata


def test_what_a_child_hands_over_must_be_sealed_and_whole(model, tmp_path):
    data = bytearray(model.get_file_stream().read())
    with MemoryFile() as unsealed:
        unsealed.write(data)
        with pytest.raises(ModelFormatError, match="not fully sealed"):
            ScaleoutModel.from_fd(unsealed._fd)
    path = tmp_path / "model"
    path.write_bytes(data)
    with open(path, "rb") as file:
        with pytest.raises(ModelFormatError, match="not sealed memory"):
            ScaleoutModel.from_fd(file.fileno())
        with ScaleoutModel.from_fd(file.fileno(), verify=False) as trusted:
            assert equal(trusted.get_training_model(), WEIGHTS)
    data[data.index(WEIGHTS[0].tobytes()) + 5] ^= 1
    with (
        SealedMemory.of(bytes(data)) as damaged,
        pytest.raises(ModelFormatError, match=r"training_model.bin.*CRC"),
    ):
        ScaleoutModel.from_fd(damaged.fileno())
    with SealedMemory.of(b"\0" * 100) as bare, pytest.raises(ModelFormatError):
        ScaleoutModel.from_fd(bare.fileno())


def test_damage_is_found_when_the_part_is_used(model):
    data = bytearray(model.get_file_stream().read())
    data[data.index(WEIGHTS[0].tobytes()) + 5] ^= 1
    loaded = ScaleoutModel.from_stream(io.BytesIO(data))
    for use in (loaded, loaded.to_builder().set_model_id("renamed").build()):
        with pytest.raises(ModelFormatError, match=r"training_model.bin.*CRC"):
            use.get_training_model()
        with pytest.raises(ModelFormatError, match=r"training_model.bin.*CRC"):
            use.verify()


def test_it_cannot_be_pickled_or_copied(model):
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="by descriptor"):
            attempt(model)


def test_deprecated_name_warns(model):
    with pytest.warns(DeprecationWarning, match="get_training_model"):
        assert equal(model.get_model_params(), WEIGHTS)


@pytest.mark.parametrize(
    ("stamped", "seen"),
    [
        ({"version": 2}, {}),
        ({"_version": 2}, {}),
        ({"version": 2, "_version": 2}, {}),
        ({}, {}),
        ({"version": 7, "_version": 2}, {"version": 7}),
        ({"version": "1.0"}, {"version": "1.0"}),
        # What 1.0.7 makes of our file with a user's "version", and 1.1 of one by 1.0.7.
        ({"_version": 2, "tag": "a", "version": 2}, {"tag": "a"}),
        ({"version": 2, "tag": "a", "_version": 2}, {"tag": "a"}),
    ],
)
def test_container_versions(stamped, seen):
    data = zip_of({"metadata.json": json.dumps({"model_id": "m", **stamped}).encode()})
    loaded = ScaleoutModel.from_stream(io.BytesIO(data))
    assert loaded.metadata == {"model_id": "m", **seen}
    assert loaded.format_version == 2
    assert not loaded.has_training_model
    with pytest.raises(ModelError, match=r"no training_model\.bin"):
        loaded.get_training_model_stream()


@pytest.mark.parametrize("key", ["version", "_version"])
def test_a_newer_container_is_refused(key):
    data = zip_of({"metadata.json": b'{"%s": 3}' % key.encode()})
    with pytest.raises(IncompatibleModelFormatError, match="version 3"):
        ScaleoutModel.from_stream(io.BytesIO(data))


def test_size_limit():
    with ScaleoutModel.from_training_model([np.zeros(1000)]) as model:
        limits = ContainerLimits(max_size=1000)
        with pytest.raises(ModelFormatError, match="larger than"):
            ScaleoutModel.from_stream(model.get_file_stream(), limits=limits)
        with pytest.raises(ModelFormatError, match="1,000 are allowed"):
            ScaleoutModel.from_fd(model.fileno(), limits=limits)
    with SealedMemory.of(b"\0" * 2000) as bare, pytest.raises(ModelFormatError, match="1,000 are allowed"):
        ScaleoutModel.from_memory(bare.dup(), limits=limits)


def test_a_thousand_models_leave_no_descriptor():
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for index in range(1000):
        model = ScaleoutModel.from_training_model(WEIGHTS)
        model.get_training_model()
        if index % 2:
            model.close()
    del model
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_importing_models_stays_light():
    code = (
        "import sys, scaleout_mp.model\n"
        "heavy = {'google', 'grpc', 'cryptography', 'psutil', 'requests'}\n"
        "sys.exit(', '.join(heavy & {name.partition('.')[0] for name in sys.modules}) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
