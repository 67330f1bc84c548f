"""A module that makes a temporary folder when it is imported, as some do, and a task on it."""

from __future__ import annotations

import os
import tempfile

FOLDER = tempfile.TemporaryDirectory()


def use():
    with open(os.path.join(FOLDER.name, str(os.getpid())), "w") as file:
        file.write("x")
    return FOLDER.name
