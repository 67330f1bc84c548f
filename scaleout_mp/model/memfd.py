"""Bytes behind a descriptor: sealed anonymous memory, and files mapped in place.

Nothing made here has a name in a file system, so nothing can be left behind. See memfd_create(2), and
fcntl(2) on file sealing.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import hashlib
import itertools
import mmap
import os
import stat
import threading
import weakref
from typing import TYPE_CHECKING, Final, Self

from scaleout_mp.errors import ModelFormatError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scaleout_mp.model.hashing import RunningHash

#: Nobody can shrink (SIGBUS in a reader), grow, rewrite or unseal the memory once it is handed over.
ALL_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL

#: What a model from outside may weigh, unless the caller says otherwise.
DEFAULT_MAX_SIZE: Final = 16 << 30


#: From this many bytes on, mapping them in one call is worth it. Linux 5.14, madvise(2).
_POPULATE_FROM: Final = 1 << 20
_MADV_POPULATE_READ: Final = 22

#: UIO_MAXIOV of Linux, writev(2).
_MOST_PARTS: Final = 1024

Bytes = bytes | bytearray | memoryview


class MappedBytes:
    """Bytes behind a descriptor of ours, mapped read-only.

    Arrays and memoryviews taken from the map keep it alive after `close`, and with it the pages.
    """

    def __init__(self, fd: int, size: int, *, sha256: str | None = None) -> None:
        """Take ownership of `fd`, which holds `size` bytes."""
        self._fd = fd
        # Not at exit: by then a forked child may have closed all descriptors and reused the number.
        self._closer = weakref.finalize(self, os.close, fd)
        self._closer.atexit = False
        self._size = size
        self._sha256 = sha256
        self._map: mmap.mmap | None = None
        # A descriptor that another thread closes meanwhile may already be that of another file.
        self._lock = threading.RLock()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a regular file where it lies, without a copy.

        The file must not be truncated while it is mapped: a reader would die of SIGBUS. Replacing it by
        rename is fine.
        """
        # O_NONBLOCK: a FIFO in the file's place must not hang us; regular files ignore it.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise ModelFormatError(f"{os.fspath(path)} is not a regular file")  # noqa: TRY301
            return cls(fd, status.st_size)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def from_fd(cls, fd: int) -> Self:
        """Adopt a duplicate of a descriptor of a file or of memory."""
        own = _dup(fd)
        try:
            status = os.fstat(own)
            if not stat.S_ISREG(status.st_mode):
                raise ModelFormatError("the descriptor is neither a file nor memory")  # noqa: TRY301
            return cls(own, status.st_size)
        except BaseException:
            os.close(own)
            raise

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self._size

    @property
    def closed(self) -> bool:
        """Whether the descriptor was given back."""
        return not self._closer.alive

    def fileno(self) -> int:
        """Return the descriptor; it stays ours."""
        self._require_open()
        return self._fd

    def map(self) -> mmap.mmap:
        """Return the read-only map; made once. Empty bytes cannot be mapped: ValueError."""
        with self._lock:
            self._require_open()
            if self._map is None:
                # MAP_PRIVATE: before Linux 6.7 a shared map of a write-sealed memfd is refused, read-only or not.
                # The pages are the same, and none is ever copied, since nothing can write through the map.
                self._map = mmap.mmap(self._fd, self._size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
            return self._map

    def view(self) -> memoryview:
        """Return all bytes as a read-only view of the map."""
        return memoryview(self.map()) if self._size else memoryview(b"")

    def span(self, start: int, end: int) -> memoryview:
        """Return the bytes from `start` up to `end` as a read-only view."""
        return self.view()[start:end]

    def will_read(self, start: int, end: int) -> None:
        """Map the pages from `start` up to `end` at once: cheaper than a fault for every 16 of them."""
        start -= start % mmap.PAGESIZE
        if end - start >= _POPULATE_FROM:
            # Older kernels do not know it, and a page of a broken disk is left to whoever reads it.
            with contextlib.suppress(OSError):
                self.map().madvise(_MADV_POPULATE_READ, start, end - start)

    def pieces(self) -> Iterator[memoryview]:
        """Yield all bytes in order, in as few views as they lie in."""
        yield self.view()

    def copy_into(self, file: MemoryFile, start: int, end: int) -> None:
        """Append the bytes from `start` up to `end` to `file`, inside the kernel."""
        file.copy(self, start, end)

    def sha256(self) -> str:
        """Return the SHA-256 of the bytes in hex; computed once."""
        if self._sha256 is None:
            self.will_read(0, self._size)
            self._sha256 = hashlib.sha256(self.view()).hexdigest()
        return self._sha256

    def dup(self) -> Self:
        """Return a second owner of the same bytes, with a descriptor and a map of its own."""
        with self._lock:
            twin = type(self)(_dup(self.fileno()), self._size)
        twin._sha256 = self._sha256  # noqa: SLF001 - the same class
        return twin

    def moved_to(self, fd: int) -> MappedBytes:
        """Return the owner of `fd`, a file that now holds the same bytes."""
        return MappedBytes(fd, self.size, sha256=self._sha256)

    def close(self) -> None:
        """Give the descriptor back, and the map as soon as no view of it is left. Safe to call again."""
        with self._lock:
            self._closer()
            # Not mmap.close(), which unmaps even under those who refer to the map without an export of its
            # buffer, as numpy.ndarray(buffer=...) does: the map goes with the last reference to it.
            self._map = None

    def _require_open(self) -> None:
        if not self._closer.alive:
            raise ValueError("the model's bytes were closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SealedMemory(MappedBytes):
    """Anonymous memory that nobody can change any more, whoever holds a descriptor of it."""

    @classmethod
    def of(cls, data: Bytes, *, name: str = "scaleout-model") -> Self:
        """Copy `data` into new sealed memory."""
        with MemoryFile(name=name) as file:
            file.write(data)
            return cls(*file.release())

    @classmethod
    def from_fd(cls, fd: int) -> Self:
        """Adopt a duplicate of a sealed memfd; ModelFormatError when it is not sealed."""
        verify_sealed(fd)
        return super().from_fd(fd)


class MemoryFile:
    """Anonymous memory while it is filled: append, patch what was written, seal."""

    def __init__(self, *, name: str = "scaleout-model", hashing: bool = False) -> None:
        """Make empty memory; `name` shows in /proc/<pid>/fd.

        `hashing`: compute the SHA-256 while bytes are written, on another core when they are many. What is written must
        then not be changed before `seal` has returned.
        """
        self._fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._closer = weakref.finalize(self, os.close, self._fd)
        self._closer.atexit = False
        self._hash = _running_hash() if hashing else None
        #: Bytes written so far.
        self.size = 0

    def write(self, *parts: Bytes) -> int:
        """Append all parts, in order, in as few system calls as possible; returns the bytes written."""
        self._require_open()
        if self._hash is not None:
            self._hash.update(parts)
        # By write(2), not through a map: the kernel fills fresh pages without a fault for each.
        written = write_all(self._fd, *parts)
        self.size += written
        return written

    def copy(self, source: MappedBytes, start: int, end: int) -> None:
        """Append bytes of another file or memory; they do not pass through this process."""
        self._require_open()
        if self._hash is not None:
            self._hash.update((source.span(start, end),))
        # sendfile takes any pair of files; copy_file_range, no faster, refuses some.
        while start < end:
            done = os.sendfile(self._fd, source.fileno(), start, end - start)
            if not done:
                raise ModelFormatError("the model's file was cut off while it was read")
            start += done
            self.size += done

    def patch(self, offset: int, data: Bytes) -> None:
        """Overwrite bytes that were written before."""
        if offset + len(data) > self.size:
            raise ValueError("a patch must lie within what was written")
        self.stop_hashing()
        if os.pwrite(self._fd, data, offset) != len(data):
            raise OSError("short write to memory")

    def release(self) -> tuple[int, int]:
        """Seal the memory and give up the descriptor; returns (descriptor, size)."""
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, ALL_SEALS)
        if self._closer.detach() is None:
            raise ValueError("the memory was sealed or closed")
        return self._fd, self.size

    def seal(self) -> SealedMemory:
        """Make the bytes final and return them."""
        sha256 = None if self._hash is None else self._hash.hexdigest()
        return SealedMemory(*self.release(), sha256=sha256)

    def close(self) -> None:
        """Drop the memory, unless it was sealed and handed on."""
        self.stop_hashing()
        self._closer()

    def stop_hashing(self) -> None:
        """Leave the SHA-256 to whoever asks for it: bytes will be changed after they were written."""
        if self._hash is not None:
            self._hash.stop()
            self._hash = None

    def _require_open(self) -> None:
        if not self._closer.alive:
            raise ValueError("the memory was sealed or closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MemoryWriter:
    """Sealed memory filled piece by piece, hashed on the way and bounded. Used for downloads."""

    def __init__(self, *, max_size: int = DEFAULT_MAX_SIZE, name: str = "scaleout-model") -> None:
        self._file = MemoryFile(name=name)
        self._digest = hashlib.sha256()
        self._max_size = max_size

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._file.size

    def hexdigest(self) -> str:
        """Return the SHA-256 of what was written so far, in hex."""
        return self._digest.hexdigest()

    def write(self, data: Bytes) -> int:
        """Append `data`; ModelFormatError when that would pass the maximum size."""
        if self._file.size + len(data) > self._max_size:
            raise ModelFormatError(f"the model is larger than the {self._max_size:,} bytes that are allowed")
        written = self._file.write(data)
        self._digest.update(data)
        return written

    def seal(self) -> SealedMemory:
        """Make the bytes final and return them; they know their SHA-256."""
        fd, size = self._file.release()
        return SealedMemory(fd, size, sha256=self._digest.hexdigest())

    def close(self) -> None:
        """Drop the memory, unless it was sealed."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _running_hash() -> RunningHash:
    # Rarely asked for, and tasks load this module.
    from scaleout_mp.model.hashing import RunningHash

    return RunningHash()


def verify_sealed(fd: int) -> None:
    """Check that a descriptor from another process is anonymous memory with every seal set.

    Without them the sender could rewrite the bytes after they were checked, or truncate them under a reader.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ModelFormatError(f"the descriptor is not sealed memory: {error.strerror}") from error
    if seals & ALL_SEALS != ALL_SEALS:
        raise ModelFormatError(f"the memory is not fully sealed (seals {seals:#x})")


def is_sealed(fd: int) -> bool:
    """Say whether a descriptor is memory that nobody can change any more."""
    try:
        verify_sealed(fd)
    except ModelFormatError:
        return False
    return True


def write_all(fd: int, *parts: Bytes) -> int:
    """Write all parts to a descriptor; returns the number of bytes.

    One call takes at most 1024 parts, moves at most 2 GiB, and may stop short of that.
    """
    pending = collections.deque(view for view in (memoryview(part) for part in parts) if view.nbytes)
    total = sum(view.nbytes for view in pending)
    while pending:
        done = os.writev(fd, list(itertools.islice(pending, _MOST_PARTS)))
        while pending and done >= pending[0].nbytes:
            done -= pending.popleft().nbytes
        if pending and done:
            pending[0] = pending[0][done:]
    return total


def _dup(fd: int) -> int:
    """Duplicate a descriptor; unlike os.dup the duplicate is close-on-exec and never one of 0, 1, 2."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
