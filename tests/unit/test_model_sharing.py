"""Models that differ in their metadata only: they share their weights, and nobody can tell."""

import hashlib
import io
import json
import os
import threading
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaleout_mp.errors import ModelFormatError
from scaleout_mp.model import ContainerLimits, MemoryWriter, ScaleoutModel, ScaleoutModelBuilder
from scaleout_mp.model.memfd import MemoryFile, verify_sealed
from scaleout_mp.model.spliced import SplicedBytes

WEIGHTS = [np.arange(40_000, dtype=np.float32), np.array([1.5, -2.5])]


def equal(first, second) -> bool:
    return len(first) == len(second) and all(map(np.array_equal, first, second))


def shares(model: ScaleoutModel) -> bool:
    source = model._container.source
    return isinstance(source, SplicedBytes) and source._whole is None


def bytes_of(model: ScaleoutModel) -> bytes:
    return b"".join(model.iter_chunks())


@pytest.fixture
def model():
    with ScaleoutModel.from_training_model(WEIGHTS, metadata={"round": 3}, compression="stored") as built:
        yield built


@pytest.fixture
def renamed(model):
    with model.to_builder().set_model_id("final").build() as other:
        yield other


def test_a_new_id_shares_the_weights(model, renamed):
    assert shares(renamed)
    for one, other in zip(model.get_training_model(), renamed.get_training_model(), strict=True):
        assert np.shares_memory(np.frombuffer(model._container.source.view(), np.uint8), one)
        assert one.tobytes() == other.tobytes()
        assert not other.flags.writeable
        assert other.ctypes.data % 64 == 0
    assert renamed.metadata == {**model.metadata, "model_id": "final"}
    assert shares(renamed)


def test_no_page_is_taken_for_it(model):
    descriptors = {os.fstat(model.fileno()).st_ino}
    others = [model.to_builder().set_model_id(str(number)).build() for number in range(10)]
    for other in others:
        assert other.checksum
        assert equal(other.get_training_model(), WEIGHTS)
        descriptors.add(os.fstat(other._container.source.head.fileno()).st_ino)
    assert len(descriptors) == 1


def test_its_bytes_are_a_whole_container(model, renamed, tmp_path):
    data = bytes_of(renamed)
    assert len(data) == renamed.size
    assert shares(renamed)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert json.loads(archive.read("metadata.json"))["model_id"] == "final"
    with ScaleoutModel.from_stream(io.BytesIO(data)) as read:
        assert read.metadata == renamed.metadata
        assert read.checksum == renamed.checksum
        assert equal(read.get_training_model(), WEIGHTS)
        read.verify()
    messages = b"".join(chunk.data for chunk in renamed.get_filechunk_stream(1000))
    assert messages == data
    checksum = renamed.checksum
    assert shares(renamed)
    renamed.save_to_file(tmp_path / "model.scm")
    assert (tmp_path / "model.scm").read_bytes() == data
    assert renamed.checksum == checksum
    assert equal(renamed.get_training_model(), WEIGHTS)


def test_a_descriptor_is_of_a_sealed_copy_of_its_own(model, renamed):
    data = bytes_of(renamed)
    verify_sealed(renamed.fileno())
    assert not shares(renamed)
    model.close()
    with ScaleoutModel.from_fd(renamed.fileno()) as received:
        assert bytes_of(received) == data
        assert received.model_id == "final"
    assert renamed.get_file_stream().read() == data
    assert equal(renamed.get_training_model(), WEIGHTS)


def test_each_may_be_closed_first(model):
    first = model.to_builder().set_model_id("first").build()
    second = first.to_builder().set_metadata("round", 4).build()
    third = second.to_builder().build()
    model.close()
    first.close()
    assert shares(second)
    assert second.metadata["round"] == 4
    second.close()
    assert equal(third.get_training_model(), WEIGHTS)
    third.close()
    for use in (third.fileno, third.get_file_stream, third.get_training_model, lambda: list(third.iter_chunks())):
        with pytest.raises(ValueError, match="closed"):
            use()
    assert third.closed


def test_copies_are_taken_over_by_others_whole(renamed):
    longer = renamed.to_builder().set_file("notes.txt", b"x").set_model_id("longer").build()
    assert longer.get_file("notes.txt") == b"x"
    assert equal(longer.get_training_model(), WEIGHTS)
    longer.verify()


def test_a_file_is_copied_because_it_may_change(model, tmp_path):
    path = tmp_path / "model.scm"
    with model.to_builder().build() as other:
        other.save_to_file(path)
    with ScaleoutModel.from_file(path) as loaded:
        renamed = loaded.to_builder().set_model_id("final").build()
    assert not shares(renamed)
    with open(path, "r+b") as file:
        file.write(b"\xff" * os.path.getsize(path))
    assert equal(renamed.get_training_model(), WEIGHTS)
    renamed.verify()


def test_metadata_that_do_not_stand_last_are_replaced_all_the_same():
    """As released writers lay containers out, and as a task may."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("metadata.json", '{"model_id": "chosen by the task", "helper_type": "numpyhelper"}')
        weights = io.BytesIO()
        np.savez_compressed(weights, **{"0": WEIGHTS[0]})
        archive.writestr("training_model.bin", weights.getvalue())
    with MemoryFile() as file:
        file.write(target.getvalue())
        memory = file.seal()
    with memory, ScaleoutModel.from_fd(memory.fileno()) as sent:
        final = sent.to_builder().set_model_id("final").build()
    with zipfile.ZipFile(io.BytesIO(bytes_of(final))) as archive:
        assert json.loads(archive.read("metadata.json"))["model_id"] == "final"
        assert archive.namelist() == ["training_model.bin", "metadata.json"]
    assert equal(final.get_training_model(), WEIGHTS[:1])


def test_limits_on_what_was_received_outlive_a_new_id():
    weights = io.BytesIO()
    np.savez_compressed(weights, **{"0": np.zeros(1 << 20, np.uint8)})
    limits = ContainerLimits(max_inflated=1 << 16)
    bare = io.BytesIO(weights.getvalue())
    legacy = ScaleoutModelBuilder.from_stream(bare, limits=limits).set_helper_type("numpyhelper").build()
    with pytest.raises(ModelFormatError, match="inflate to more than"):
        legacy.get_training_model()
    with MemoryWriter() as writer:
        writer.write(bytes_of(legacy))
        received = ScaleoutModel.from_memory(writer.seal(), limits=limits)
    for use in (received, received.to_builder().set_model_id("other").build()):
        with pytest.raises(ModelFormatError, match="inflate to more than"):
            use.get_training_model()


def all_at_once(*works):
    """Run each in a thread of its own and return what they raised."""
    raised = []

    def run(work):
        try:
            work()
        except Exception as error:  # the test looks at all of them
            raised.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_closing_while_others_read_is_told_as_such():
    """A descriptor that is closed under a reader would be an error of the system, or another file."""
    raised = []
    for turn in range(200):
        model = ScaleoutModel.from_training_model(WEIGHTS)
        if turn % 2:
            model = model.to_builder().set_model_id("renamed").build()
        raised += all_at_once(model.get_training_model, model.fileno, model.to_builder, model.verify, model.close)
    assert {(type(error), str(error)) for error in raised} <= {(ValueError, "the model's bytes were closed")}


def test_saving_while_others_read_disturbs_nobody(model, tmp_path):
    def save():
        for _ in range(50):
            model.save_to_file(tmp_path / "model.scm")

    def read():
        for _ in range(50):
            assert equal(model.get_training_model(), WEIGHTS)
            model.to_builder().set_metadata("k", 1).build().close()

    assert all_at_once(save, save, read, read) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.scm"]


def test_a_saved_model_is_that_file_whatever_takes_its_place(model, tmp_path):
    path = tmp_path / "model.scm"
    model.save_to_file(path)
    ScaleoutModel.from_training_model([np.zeros(2)]).save_to_file(path)
    assert equal(model.get_training_model(), WEIGHTS)
    assert model.checksum == hashlib.sha256(model.get_file_stream().read()).hexdigest()


def test_threads_may_ask_for_the_descriptor_at_once(renamed):
    found = []
    assert all_at_once(*[lambda: found.append(renamed.fileno())] * 8) == []
    assert len(found) == 8
    assert len(set(found)) == 1


changes = st.one_of(
    st.tuples(st.just("id"), st.text(min_size=1, max_size=5)),
    st.tuples(st.just("metadata"), st.text(max_size=5)),
    st.tuples(st.just("file"), st.binary(max_size=50)),
    st.tuples(st.just("descriptor"), st.none()),
    st.tuples(st.just("stream"), st.none()),
)


@settings(deadline=None)
@given(st.lists(changes, max_size=6))
def test_any_chain_of_changes_gives_what_was_asked_for(chain):
    model = ScaleoutModel.from_training_model(WEIGHTS[1:])
    expected, files = model.metadata, {}
    for kind, value in chain:
        builder = model.to_builder()
        if kind == "id":
            model, expected = builder.set_model_id(value).build(), {**expected, "model_id": value}
        elif kind == "metadata":
            model = builder.set_metadata("note", value).build()
            expected = {**expected, "note": value, "model_id": model.model_id}
        elif kind == "file":
            model = builder.set_file("file", value).build()
            files["file"] = value
            expected = {**expected, "model_id": model.model_id}
        elif kind == "descriptor":
            model = ScaleoutModel.from_fd(model.fileno())
        else:
            model = ScaleoutModel.from_stream(io.BytesIO(bytes_of(model)))
    assert model.metadata == expected
    assert {name: model.get_file(name) for name in model.list_files()} == files
    assert equal(model.get_training_model(), WEIGHTS[1:])
    assert len(bytes_of(model)) == model.size
    model.verify()
