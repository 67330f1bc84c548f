"""Models on disk."""

import numpy as np
import pytest

from scaleout_mp.errors import ModelFormatError, ModelNotFoundError
from scaleout_mp.model import ModelStore, ScaleoutModel


def test_put_get_list_delete(tmp_path):
    store = ModelStore(tmp_path / "deep" / "store")
    with ScaleoutModel.from_training_model([np.arange(3)]) as model:
        path = store.put(model)
        model_id = model.model_id
        checksum = model.checksum
        assert store.put(model) == path
    assert path == str(tmp_path / "deep" / "store" / f"{model_id}.scm")
    assert store.list() == (model_id,)
    assert [entry.name for entry in (tmp_path / "deep" / "store").iterdir()] == [f"{model_id}.scm"]
    with store.get(model_id, verify=True) as loaded:
        assert loaded.checksum == checksum
        store.delete(model_id)
        store.delete(model_id)
        assert loaded.get_training_model()[0].tolist() == [0, 1, 2]
    assert store.list() == ()
    with pytest.raises(ModelNotFoundError, match=model_id):
        store.get(model_id)


@pytest.mark.parametrize("bad", ["", ".", "..", ".hidden", "a/b", "/a", "a\0", "a b", "x" * 201])
def test_ids_must_be_plain_names(tmp_path, bad):
    with pytest.raises(ValueError, match="cannot be a model's file name"):
        ModelStore(tmp_path).path(bad)


def test_damage_is_found_at_once_when_asked_for(tmp_path):
    store = ModelStore(tmp_path)
    with ScaleoutModel.from_training_model([np.arange(3)]) as model:
        path = store.put(model)
        model_id = model.model_id
    with open(path, "r+b") as file:
        data = bytearray(file.read())
        data[data.index(np.arange(3).tobytes())] ^= 1
        file.seek(0)
        file.write(data)
    with pytest.raises(ModelFormatError, match="CRC"):
        store.get(model_id, verify=True)
    with store.get(model_id) as loaded, pytest.raises(ModelFormatError, match="CRC"):
        loaded.get_training_model()


def test_other_files_are_not_listed(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".part.scm").write_text("x")
    assert ModelStore(tmp_path).list() == ()
