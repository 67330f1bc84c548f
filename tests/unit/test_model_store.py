"""Models on disk."""

import os
import subprocess
import sys

import numpy as np
import pytest

from scaleout_mp.errors import ModelError, ModelFormatError, ModelNotFoundError
from scaleout_mp.model import ContainerLimits, ModelStore, ScaleoutModel, get_helper


def models_in(folder) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name != ".lock")


def make(size: int = 1000) -> ScaleoutModel:
    return ScaleoutModel.from_training_model([np.arange(size, dtype=np.uint8)], compression="stored")


def fill(store: ModelStore, count: int) -> list[str]:
    """Put models of equal size, each used after the one before."""
    ids = []
    for index in range(count):
        with make() as model:
            path = store.put(model)
            ids.append(model.model_id)
        os.utime(path, ns=(index, os.stat(path).st_mtime_ns))
    return ids


def size_of_one() -> int:
    with make() as model:
        return model.size


def test_put_get_list_delete(tmp_path):
    folder = tmp_path / "deep" / "store"
    store = ModelStore(folder)
    with ScaleoutModel.from_training_model([np.arange(3)]) as model:
        path = store.put(model)
        model_id = model.model_id
        checksum = model.checksum
        assert store.put(model) == path
    assert path == str(folder / f"{model_id}.scm")
    assert store.list() == (model_id,)
    assert models_in(folder) == [f"{model_id}.scm"]
    with store.get(model_id) as loaded:
        assert loaded.checksum == checksum
        store.delete(model_id)
        store.delete(model_id)
        assert loaded.get_training_model()[0].tolist() == [0, 1, 2]
    assert store.list() == ()
    with pytest.raises(ModelNotFoundError, match=model_id):
        store.get(model_id)


def test_a_model_that_shares_its_weights_is_stored_whole(tmp_path):
    store = ModelStore(tmp_path)
    with make() as model:
        with model.to_builder().set_model_id("renamed").build() as renamed:
            store.put(renamed)
            checksum = renamed.checksum
        with store.get("renamed") as loaded:
            assert loaded.checksum == checksum
            assert loaded.get_training_model()[0].tolist() == model.get_training_model()[0].tolist()


@pytest.mark.parametrize("bad", ["", ".", "..", ".hidden", "a/b", "/a", "a\0", "a b", "x" * 201])
def test_ids_must_be_plain_names(tmp_path, bad):
    with pytest.raises(ValueError, match="cannot be a model's file name"):
        ModelStore(tmp_path).path(bad)


def test_the_longest_id_that_is_allowed_can_be_stored(tmp_path):
    store = ModelStore(tmp_path)
    with make() as model, model.to_builder().set_model_id("x" * 200).build() as named:
        store.put(named)
    assert store.list() == ("x" * 200,)


def damage(path: str) -> None:
    with open(path, "r+b") as file:
        data = bytearray(file.read())
        data[data.index(np.arange(3).tobytes())] ^= 1
        file.seek(0)
        file.write(data)
    os.utime(path, ns=(0, 0))


def test_bare_weights_have_the_id_that_they_are_asked_for_by(tmp_path):
    np.savez(tmp_path / "seed.npz", **{"0": np.arange(3)})
    (tmp_path / "seed.npz").rename(tmp_path / "seed.scm")
    with ModelStore(tmp_path).get("seed") as model:
        assert model.model_id == "seed"
        assert model.legacy_source
        assert model.get_training_model(get_helper("numpyhelper"))[0].tolist() == [0, 1, 2]


def test_damage_is_found_on_load(tmp_path):
    store = ModelStore(tmp_path)
    with ScaleoutModel.from_training_model([np.arange(3)]) as model:
        path = store.put(model)
        model_id = model.model_id
    damage(path)
    for reader in (store, ModelStore(tmp_path)):
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(ModelFormatError, match="CRC"):
            reader.get(model_id)
        assert len(os.listdir("/proc/self/fd")) == before
        with reader.get(model_id, verify=False) as loaded, pytest.raises(ModelFormatError, match="CRC"):
            loaded.get_training_model()


def test_a_file_is_verified_once(tmp_path, monkeypatch):
    store = ModelStore(tmp_path)
    with ScaleoutModel.from_training_model([np.arange(3)]) as model:
        store.put(model)
        model_id = model.model_id
    verified = []
    monkeypatch.setattr(ScaleoutModel, "verify", lambda _self: verified.append(1))
    store.get(model_id).close()
    assert not verified
    another = ModelStore(tmp_path)
    for _ in range(3):
        another.get(model_id).close()
    assert len(verified) == 1


def test_limits_hold_for_what_is_read(tmp_path):
    with make() as model:
        ModelStore(tmp_path).put(model)
    with pytest.raises(ModelFormatError, match="100 are allowed"):
        ModelStore(tmp_path, limits=ContainerLimits(max_size=100)).get(model.model_id)


def test_other_files_are_not_listed(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".part.scm").write_text("x")
    assert ModelStore(tmp_path).list() == ()


def test_those_not_used_for_longest_go_first(tmp_path, caplog):
    caplog.set_level("INFO")
    size = size_of_one()
    store = ModelStore(tmp_path, max_bytes=3 * size)
    first, second, third = fill(store, 3)
    store.get(first).close()
    with make() as model:
        store.put(model)
    assert set(store.list()) == {first, third, model.model_id}
    assert [(record.action, record.model_id) for record in caplog.records] == [("model_evicted", second)]


def test_models_in_use_stay(tmp_path, caplog):
    size = size_of_one()
    store = ModelStore(tmp_path, max_bytes=2 * size)
    first, second = fill(store, 2)
    # In the other's hands, as a model is that a task has the descriptor of.
    with store.get(first) as used, ScaleoutModel.from_fd(used.fileno(), verify=False) as elsewhere:
        used.close()
        with make() as third:
            ModelStore(tmp_path, max_bytes=2 * size).put(third)
        assert set(store.list()) == {first, third.model_id}
        with store.get(third.model_id), make() as fourth:
            store.put(fourth)
            assert set(store.list()) == {first, third.model_id, fourth.model_id}
            assert [record.action for record in caplog.records] == ["store_full"]
        assert elsewhere.get_training_model()[0].size == 1000
    assert second not in store.list()
    with make() as fifth:
        store.put(fifth)
    assert set(store.list()) == {fourth.model_id, fifth.model_id}


def test_a_model_larger_than_the_store_is_refused(tmp_path):
    with make() as model, pytest.raises(ModelError, match="holds 100 at most"):
        ModelStore(tmp_path, max_bytes=100).put(model)
    assert models_in(tmp_path) == []
    with pytest.raises(ValueError, match="positive"):
        ModelStore(tmp_path, max_bytes=0)


def test_what_a_killed_writer_left_is_removed(tmp_path):
    left = tmp_path / ".model.0123.part"
    left.write_bytes(b"half")
    store = ModelStore(tmp_path)
    with make() as outer, store._part("alive") as (alive, _):
        store.put(outer)
        assert not left.exists()
        assert os.path.exists(alive)
    assert models_in(tmp_path) == [f"{outer.model_id}.scm"]


def test_a_failed_put_leaves_nothing(tmp_path, monkeypatch):
    def full(_fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with make() as model, pytest.raises(OSError, match="No space"):
        ModelStore(tmp_path).put(model)
    assert models_in(tmp_path) == []


CROWD = """
import random, sys
import numpy as np
from scaleout_mp.errors import ModelNotFoundError
from scaleout_mp.model import ModelStore, ScaleoutModel

folder, max_bytes, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
store, chance = ModelStore(folder, max_bytes=max_bytes), random.Random(seed)
found = 0
for turn in range(150):
    number = chance.randrange(8)
    name = f"model-{number}"
    if chance.random() < 0.5:
        weights = [np.full(1000, number, np.uint8)]
        with ScaleoutModel.from_training_model(weights, compression="stored") as model:
            with model.to_builder().set_model_id(name).build() as named:
                store.put(named)
    else:
        try:
            with store.get(name) as model:
                model.verify()
                assert model.model_id == name
                assert set(model.get_training_model()[0].tolist()) == {number}
                found += 1
        except ModelNotFoundError:
            pass
print(found)
"""


def test_several_processes_share_one_folder(tmp_path):
    bound = 4 * size_of_one()
    crowd = [
        subprocess.Popen(
            [sys.executable, "-c", CROWD, str(tmp_path), str(bound), str(seed)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(3)
    ]
    for process in crowd:
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert int(output) > 0
    names = models_in(tmp_path)
    assert not [name for name in names if not name.endswith(".scm")]
    with make() as last:
        ModelStore(tmp_path, max_bytes=bound).put(last)
    assert sum(os.path.getsize(tmp_path / name) for name in models_in(tmp_path)) <= bound
