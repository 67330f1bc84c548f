"""Putting whole files in place."""

from __future__ import annotations

import contextlib
import os
import uuid

from scaleout_mp.errors import ModelError
from scaleout_mp.model.memfd import Bytes, write_all


def replace_file(path: str | os.PathLike[str], *parts: Bytes, sync: bool) -> None:
    """Do as `replace_and_open`, for who will not read the file."""
    os.close(replace_and_open(path, *parts, sync=sync))


def replace_and_open(path: str | os.PathLike[str], *parts: Bytes, sync: bool) -> int:
    """Write all parts beside `path` and rename it there: a reader sees the old file or the new one.

    Behind a symbolic link, it is the file that is replaced. ModelError when there is a device, a pipe or a socket: a
    rename would take its place. `sync`: make it survive a loss of power, too. Returns a descriptor to read the file by,
    also when another one has taken its place.
    """
    path = os.path.realpath(os.fsdecode(path))
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise ModelError(f"{path} is not a regular file: write the bytes of get_file_stream() to it")
    folder = os.path.dirname(path)
    part = os.path.join(folder, f".{uuid.uuid4().hex}.part")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            write_all(fd, *parts)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        reader = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.replace(part, path)
            if sync:
                sync_folder(folder)
        except BaseException:
            os.close(reader)
            raise
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        raise
    return reader


def sync_folder(folder: str) -> None:
    """Make renames and deletions in a folder survive a loss of power."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
