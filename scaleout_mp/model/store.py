"""Models on disk, one file for each."""

from __future__ import annotations

import contextlib
import os
import re
from typing import Final

from scaleout_mp.errors import ModelError, ModelNotFoundError
from scaleout_mp.model.files import replace_file, sync_folder
from scaleout_mp.model.scaleout_model import ScaleoutModel

_SUFFIX: Final = ".scm"
# Becomes a file name: no separators, no leading dot, room for the suffix within 255 bytes.
_PLAIN_ID: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


class ModelStore:
    """A folder of `<model_id>.scm` files, each there whole or not at all, for several processes."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Use a folder, which is made when it is missing."""
        self.folder = os.path.abspath(folder)
        os.makedirs(self.folder, exist_ok=True)

    def put(self, model: ScaleoutModel) -> str:
        """Write a model to disk under its id, durably, and return the file's path."""
        if model.model_id is None:
            raise ModelError("a model without an id cannot be stored")
        path = self.path(model.model_id)
        with model.get_file_stream() as stream:
            replace_file(path, stream.getbuffer(), sync=True)
        return path

    def get(self, model_id: str, *, verify: bool = False) -> ScaleoutModel:
        """Return a model mapped from disk; ModelNotFoundError when it is not here.

        `verify`: read all of it and compare with its checksums first; otherwise each part is when it is
        first used.
        """
        try:
            model = ScaleoutModel.from_file(self.path(model_id))
        except FileNotFoundError as error:
            raise ModelNotFoundError(f"model {model_id} is not in {self.folder}") from error
        if verify:
            try:
                model.verify()
            except BaseException:
                model.close()
                raise
        return model

    def delete(self, model_id: str) -> None:
        """Remove a model, if it is here. Whoever has it open can go on reading it."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(model_id))
            sync_folder(self.folder)

    def list(self) -> tuple[str, ...]:
        """Return the ids of all models here, sorted."""
        names = (name.removesuffix(_SUFFIX) for name in os.listdir(self.folder) if name.endswith(_SUFFIX))
        return tuple(sorted(name for name in names if _PLAIN_ID.fullmatch(name)))

    def path(self, model_id: str) -> str:
        """Return where a model of that id lies, or would lie; ValueError unless the id is a plain name."""
        if not _PLAIN_ID.fullmatch(model_id):
            raise ValueError(f"{model_id!r} cannot be a model's file name: letters, digits, '.', '_' and '-' only")
        return os.path.join(self.folder, model_id + _SUFFIX)
