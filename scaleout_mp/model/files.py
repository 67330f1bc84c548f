"""Putting whole files in place."""

from __future__ import annotations

import contextlib
import os
import uuid

from scaleout_mp.model.memfd import Bytes, write_all


def replace_file(path: str | os.PathLike[str], *parts: Bytes, sync: bool) -> None:
    """Write all parts beside `path` and rename it there: a reader sees the old file or the new one.

    `sync`: make it survive a loss of power, too.
    """
    folder, name = os.path.split(os.path.abspath(path))
    part = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.part")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            write_all(fd, *parts)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        raise
    if sync:
        sync_folder(folder)


def sync_folder(folder: str) -> None:
    """Make renames and deletions in a folder survive a loss of power."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
