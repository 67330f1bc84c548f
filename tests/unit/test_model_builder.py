"""ScaleoutModelBuilder: what it changes, what it keeps, and when a model gets a new id."""

import gc
import io
import os
import uuid
import zipfile

import numpy as np
import pytest

from scaleout_mp.errors import ModelError
from scaleout_mp.model import ScaleoutModel, ScaleoutModelBuilder

WEIGHTS = [np.arange(12, dtype=np.float32).reshape(3, 4), np.array([1.5, -2.5])]


def equal(first, second) -> bool:
    return len(first) == len(second) and all(map(np.array_equal, first, second))


@pytest.fixture
def model():
    with ScaleoutModel.from_training_model(WEIGHTS, metadata={"round": 3}) as built:
        yield built


def test_a_new_model_has_a_fresh_id(caplog):
    builder = ScaleoutModelBuilder.from_training_model(WEIGHTS).set_metadata("model_id", "mine")
    first, second = builder.build(), builder.build()
    assert len({first.model_id, second.model_id, "mine"}) == 3
    assert uuid.UUID(first.model_id).version == 4
    assert builder.set_model_id("mine").build().model_id != "mine"
    assert [record.action for record in caplog.records] == ["model_id_ignored"]


def test_a_loaded_model_keeps_its_id_until_it_changes(model):
    assert model.to_builder().build().model_id == model.model_id
    assert model.to_builder().build().checksum == model.checksum
    assert model.to_builder().set_model_id(model.model_id).build().checksum == model.checksum
    assert model.to_builder().set_model_id("m-002").build().model_id == "m-002"
    for change in (
        lambda builder: builder.set_metadata("tag", "v2"),
        lambda builder: builder.set_metadata("model_id", "ignored"),
        lambda builder: builder.set_inference_model(b"onnx", "onnx"),
        lambda builder: builder.set_file("a.json", b"{}"),
        lambda builder: builder.set_training_model(WEIGHTS),
    ):
        assert change(model.to_builder()).build().model_id not in {model.model_id, "ignored"}
        assert change(model.to_builder()).set_model_id("chosen").build().model_id == "chosen"


def test_a_new_id_takes_over_the_weights_unchanged():
    with ScaleoutModel.from_training_model(WEIGHTS, compression="deflate") as model:
        builder = model.to_builder().set_model_id("renamed")
    renamed = builder.build(compression="stored")
    with zipfile.ZipFile(renamed.get_file_stream()) as archive:
        assert archive.getinfo("training_model.bin").compress_type == zipfile.ZIP_DEFLATED
    assert equal(renamed.get_training_model(), WEIGHTS)


def test_to_builder_leaves_the_original_alone(model):
    checksum, metadata = model.checksum, model.metadata
    changed = model.to_builder().set_training_model([np.zeros(2)]).set_metadata("round", 4).build()
    assert model.checksum == checksum
    assert model.metadata == metadata
    assert equal(changed.get_training_model(), [np.zeros(2)])
    assert changed.metadata["round"] == 4
    changed.close()
    assert equal(model.get_training_model(), WEIGHTS)


def test_inference_model_and_files(model):
    assert not model.has_inference_model
    assert model.get_inference_model_format() is None
    full = (
        model.to_builder()
        .set_inference_model_stream(io.BytesIO(b"graph"), "onnx")
        .set_file("config.json", b"{}")
        .set_file_stream("vocabulary.txt", io.BytesIO(b"a\nb\n"))
        .build()
    )
    with full.get_inference_model_stream() as stream:
        assert stream.read() == b"graph"
    assert full.has_inference_model
    assert full.get_inference_model_format() == "onnx"
    assert full.list_files() == ["config.json", "vocabulary.txt"]
    assert full.get_file("vocabulary.txt") == b"a\nb\n"
    again = full.to_builder().set_file("config.json", b"[]").build(compression="deflate")
    assert again.get_file("config.json") == b"[]"
    assert again.get_file("vocabulary.txt") == b"a\nb\n"
    assert again.has_file("config.json")
    assert not again.has_file("other")
    with pytest.raises(KeyError, match="no file 'other'"):
        again.get_file("other")


def test_builder_arguments_are_checked(model):
    builder = model.to_builder()
    for bad in ("text", bytearray(b"x")):
        with pytest.raises(TypeError, match="must be bytes"):
            builder.set_inference_model(bad, "onnx")
        with pytest.raises(TypeError, match="must be bytes"):
            builder.set_file("name", bad)
    for name in ("", ".", "..", "a/b", "/etc/passwd", "a\\b", "a..b", "nul\0"):
        with pytest.raises(ValueError, match="plain file name"):
            builder.set_file(name, b"")
    with pytest.raises(ValueError, match="too long"):
        builder.set_file("n" * 65_530, b"")
    with pytest.raises(ValueError, match="surrogates"):
        builder.set_file("\udcff", b"")
    with pytest.raises(TypeError, match="must be a string, not int"):
        builder.set_model_id(5)
    with pytest.raises(ValueError, match="must not be empty"):
        builder.set_model_id("")
    with pytest.raises(ValueError, match="no helper is named"):
        builder.set_helper_type("nohelper")


def test_the_longest_file_name_that_is_allowed_survives(model):
    name = "n" * 65_529
    with model.to_builder().set_file(name, b"x").build() as built:
        assert ScaleoutModel.from_stream(built.get_file_stream()).get_file(name) == b"x"


def test_a_stream_that_has_nothing_yet_is_not_at_its_end():
    class Trickle(io.RawIOBase):
        """A non-blocking stream: every other time there is nothing."""

        def __init__(self) -> None:
            self.turn = 0

        def read(self, _size=-1, /):
            self.turn += 1
            return b"\0" * 8 if self.turn % 2 else None

    with pytest.raises(ModelError, match="does not block"):
        ScaleoutModel.from_stream(Trickle())
    with pytest.raises(ModelError, match="does not block"):
        ScaleoutModelBuilder.from_training_model([]).set_file_stream("a", Trickle())


def test_an_iterator_gives_weights_to_one_model_only():
    builder = ScaleoutModelBuilder.from_training_model(np.zeros(size) for size in range(3))
    assert len(builder.build().get_training_model()) == 3
    with pytest.raises(ModelError, match="iterator"):
        builder.build()
    assert equal(builder.set_training_model(iter(WEIGHTS)).build().get_training_model(), WEIGHTS)


def test_a_failed_build_leaves_no_descriptor():
    class Failing:
        name = "failing"

        def save(self, weights, target, /):
            target.write(b"half")
            raise RuntimeError("no")

        def load(self, source, /):
            raise NotImplementedError

    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(RuntimeError, match="no"):
        ScaleoutModel.from_training_model([], helper=Failing())
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
