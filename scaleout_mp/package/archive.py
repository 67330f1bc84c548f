"""Archives of packages: what comes from a server is unpacked into its own folder or not at all."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import hashlib
import io
import lzma
import os
import shutil
import tarfile
import tempfile
import zlib
from typing import IO, Final, cast

from scaleout_mp.errors import PackageError

#: A header of a file's name is a few hundred bytes; nothing else is read at once.
_MAX_READ: Final = 1 << 20
_COPY_SIZE: Final = 1 << 16
#: How the folder is called that becomes the one that was asked for.
_UNFINISHED: Final = ".unpacking-"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArchiveLimits:
    """What an archive may hold; bytes are those after decompression."""

    max_bytes: int = 4 * 2**30
    #: Folders that no entry names, but the path of one, count as well.
    max_entries: int = 50_000
    #: Folders in folders. What is nested deeper can be unpacked, but not by everybody removed.
    max_depth: int = 64


_DEFAULT: Final = ArchiveLimits()


def checksum_of(path: str) -> str:
    """Return the hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(archive: str, folder: str, *, limits: ArchiveLimits = _DEFAULT) -> None:
    """Unpack a tar archive, compressed with gzip, bzip2, xz or not, into `folder`, which must not exist.

    Only folders, files and links that stay inside come out of it; owners and special permissions are left behind.
    Raises PackageError that names the entry, and then nothing is left.
    """
    parent = os.path.dirname(os.path.abspath(folder))
    os.makedirs(parent, exist_ok=True)
    temporary = tempfile.mkdtemp(dir=parent, prefix=_UNFINISHED)
    try:
        with _decompressed(archive) as stream:
            _unpack(_Bounded(stream, limits.max_bytes), temporary, limits)
        os.rename(temporary, folder)
    except (PackageError, MemoryError):
        raise
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise PackageError(f"{archive} is no tar archive, or a broken one: {error}") from error
    except OSError as error:
        raise PackageError(f"{archive} cannot be unpacked: {error}") from error
    except Exception as error:
        # Headers that contradict themselves have tarfile raise ValueError, RecursionError and others.
        raise PackageError(f"{archive} is a broken tar archive: {type(error).__name__}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_unfinished(parent: str) -> None:
    """Remove what killed programs left of their unpacking into folders in `parent`. Nobody may be unpacking there."""
    for name in os.listdir(parent):
        if name.startswith(_UNFINISHED):
            shutil.rmtree(os.path.join(parent, name), ignore_errors=True)


def _decompressed(path: str) -> IO[bytes]:
    with open(path, "rb") as file:
        start = file.read(6)
    if start.startswith(b"\x1f\x8b"):
        return cast("IO[bytes]", gzip.open(path, "rb"))
    if start.startswith(b"BZh"):
        return bz2.open(path, "rb")
    if start.startswith(b"\xfd7zXZ"):
        return lzma.open(path, "rb")
    return open(path, "rb")


class _Bounded(io.RawIOBase):
    """A stream that ends with an error when it turns out too long, or when too much is wanted at once."""

    def __init__(self, stream: IO[bytes], most: int) -> None:
        super().__init__()
        self._stream = stream
        self._most = most
        self._at = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_READ:
            # tarfile reads the names of files whole, however long they say they are.
            raise PackageError(f"a header in the archive claims to be longer than {_MAX_READ} bytes")
        data = self._stream.read(size)
        self._at += len(data)
        if self._at > self._most:
            raise PackageError(f"the archive holds more than {self._most} bytes")
        return data

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if whence != os.SEEK_SET or offset < self._at:
            raise tarfile.ReadError("it cannot be read in one go")
        while self._at < offset:
            if not self.read(min(_MAX_READ, offset - self._at)):
                break
        return self._at


def _unpack(stream: _Bounded, folder: str, limits: ArchiveLimits) -> None:
    # Opened member by member: a list of all of them would be as long as the archive wants.
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        count = 0
        while (member := archive.next()) is not None:
            count += 1 + _make_folders(member, folder, limits)
            if count > limits.max_entries:
                raise PackageError(f"the archive holds more than {limits.max_entries} entries")
            _unpack_member(archive, member, folder)
            archive.members.clear()  # type: ignore[attr-defined]


def _make_folders(member: tarfile.TarInfo, folder: str, limits: ArchiveLimits) -> int:
    """Make the folders that a member lies in; return how many there were not."""
    *parents, _ = _inside(member.name, member.name).split("/")
    if len(parents) > limits.max_depth:
        raise PackageError(
            f"the archive's entry {member.name[:80]!r}... lies more than {limits.max_depth} folders deep"
        )
    made, path = 0, folder
    for name in parents:
        path = os.path.join(path, name)
        if not os.path.isdir(path):
            os.mkdir(path)
            made += 1
    return made


def _unpack_member(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: str) -> None:
    name = _inside(member.name, member.name)
    if name == ".":
        return
    path = os.path.join(folder, name)
    if os.path.lexists(path) and not (member.isdir() and os.path.isdir(path)):
        raise PackageError(f"the archive holds {member.name!r} twice")
    if member.isdir():
        os.makedirs(path, exist_ok=True)
    elif member.issparse():
        # A few bytes of it stand for any number of zeros.
        raise PackageError(f"the archive holds {member.name!r} as a sparse file")
    elif member.isreg():
        _write(archive, member, path)
    elif member.issym():
        # Without "..", no chain of links leads out.
        if os.pardir in member.linkname.split("/"):
            raise PackageError(f"the archive's link {member.name!r} leads to {member.linkname!r}")
        os.symlink(_inside(member.linkname, member.name), path)
    else:
        raise PackageError(f"the archive holds {member.name!r}, which is neither a file nor a folder")


def _inside(name: str, entry: str) -> str:
    """Return a name as a path below the archive's folder. Raises PackageError when it is none."""
    if not name or name.startswith("/") or "\0" in name or "\\" in name or os.pardir in name.split("/"):
        raise PackageError(f"the archive's entry {entry!r} leads out of it, to {name!r}")
    return os.path.normpath(name)


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
    source = archive.extractfile(member)
    assert source is not None
    # O_EXCL and O_NOFOLLOW: it is a new file, whatever was unpacked before.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        left = member.size
        while left:
            data = source.read(min(_COPY_SIZE, left))
            if not data:
                raise PackageError(f"the archive ends in the middle of {member.name!r}")
            file.write(data)
            left -= len(data)
        os.fchmod(descriptor, 0o755 if member.mode & 0o100 else 0o644)
