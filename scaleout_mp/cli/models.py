"""Model files that a user names."""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING

from scaleout_mp.errors import ModelFormatError

if TYPE_CHECKING:
    from pathlib import Path

    from scaleout_mp.model import ScaleoutModel


def open_seed(path: Path) -> ScaleoutModel:
    """Open a model file, or make a model of arrays as numpy.savez writes them, in their order in the file.

    Raises ModelFormatError that names the file.
    """
    import numpy as np

    from scaleout_mp.model import ScaleoutModel

    if not zipfile.is_zipfile(path):
        raise ModelFormatError(f"{path} is neither a model file nor an .npz file")
    try:
        if ScaleoutModel.detect_format_file(path) == "zip":
            return ScaleoutModel.from_file(path)
        with np.load(path, allow_pickle=False) as arrays:
            return ScaleoutModel.from_training_model([arrays[name] for name in arrays.files])
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ModelFormatError(f"{path} holds no model: {error}") from error
