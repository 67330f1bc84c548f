"""The contract of a helper, and what every helper does with paths and open files."""

from __future__ import annotations

import os
from typing import Any, Protocol, runtime_checkable

from scaleout_mp.model.memfd import Bytes, write_all
from scaleout_mp.model.streams import ViewStream


class ReadableFile(Protocol):
    """An open binary file to read from."""

    def read(self, size: int = ..., /) -> bytes:
        """Return up to `size` bytes."""
        ...


class WritableFile(Protocol):
    """An open binary file to write to; need not seek."""

    def write(self, data: Any, /) -> int | None:
        """Append bytes."""
        ...


Source = str | os.PathLike[str] | ReadableFile | bytes | bytearray | memoryview
Target = str | os.PathLike[str] | WritableFile


@runtime_checkable
class Helper(Protocol):
    """Turns weights into bytes and back. Helpers have no state: one object serves all threads."""

    @property
    def name(self) -> str:
        """The name that models remember."""
        ...

    def save(self, weights: Any, target: Any, /) -> Any:
        """Write weights to a path or an open file; while a model is built, to a file that cannot seek."""
        ...

    def load(self, source: Any, /) -> Any:
        """Read weights from a path or an open file. Called when a model's weights are asked for."""
        ...


class FileSink:
    """An open file as the target of an archive."""

    def __init__(self, file: WritableFile) -> None:
        self._file = file
        #: Bytes written so far.
        self.size = 0

    def write(self, *parts: Bytes) -> int:
        """Append all parts."""
        written = 0
        for part in parts:
            view = memoryview(part).cast("B") if len(part) else memoryview(b"")
            while view.nbytes:
                # A raw file may take less than it was given, and says so.
                taken = self._file.write(view)
                count = view.nbytes if taken is None else taken
                written += count
                view = view[count:]
        self.size += written
        return written


class DescriptorSink:
    """A descriptor as the target of an archive."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        #: Bytes written so far.
        self.size = 0

    def write(self, *parts: Bytes) -> int:
        """Append all parts."""
        written = write_all(self._fd, *parts)
        self.size += written
        return written


def read_bytes(source: Source) -> tuple[memoryview, bool]:
    """Return all bytes of a source, read-only, and whether they come from a model that vouches for them.

    A model's own stream gives its bytes without a copy; its CRC-32 was compared when the stream was opened.
    """
    if isinstance(source, ViewStream):
        return source.getbuffer()[source.tell() :], True
    if isinstance(source, bytes | bytearray | memoryview):
        return memoryview(source).toreadonly(), False
    if isinstance(source, str | os.PathLike):
        with open(source, "rb") as file:
            return memoryview(file.read()), False
    return memoryview(source.read()), False


def write_bytes(target: Target, *parts: Bytes) -> None:
    """Write all parts to a path or an open file."""
    if isinstance(target, str | os.PathLike):
        with open(target, "wb", buffering=0) as file:
            write_all(file.fileno(), *parts)
    else:
        FileSink(target).write(*parts)
