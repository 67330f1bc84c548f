"""Sealed memory: what it holds, what nobody can do to it, and that its descriptors come back."""

import errno
import fcntl
import gc
import hashlib
import mmap
import os

import pytest

from scaleout_mp.errors import ModelFormatError
from scaleout_mp.model.memfd import (
    ALL_SEALS,
    MappedBytes,
    MemoryFile,
    MemoryWriter,
    SealedMemory,
    verify_sealed,
    write_all,
)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_sealed_memory_holds_the_bytes_and_cannot_be_changed():
    with SealedMemory.of(b"weights" * 1000) as memory:
        assert bytes(memory.view()) == b"weights" * 1000
        assert memory.size == 7000
        assert memory.view().readonly
        assert fcntl.fcntl(memory.fileno(), fcntl.F_GET_SEALS) == ALL_SEALS
        for attempt in (
            lambda fd: os.pwrite(fd, b"x", 0),
            lambda fd: os.ftruncate(fd, 1),
            lambda fd: os.ftruncate(fd, 8000),
            lambda fd: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0),
            lambda fd: mmap.mmap(fd, 7000, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE),
        ):
            with pytest.raises(OSError) as caught:  # noqa: PT011 - the number says which
                attempt(memory.fileno())
            assert caught.value.errno == errno.EPERM


def test_descriptors_are_not_inherited_through_exec():
    with SealedMemory.of(b"x") as memory, memory.dup() as twin:
        assert not os.get_inheritable(memory.fileno())
        assert not os.get_inheritable(twin.fileno())


def test_a_view_outlives_close():
    memory = SealedMemory.of(b"still here")
    view = memory.view()
    memory.close()
    memory.close()
    assert bytes(view) == b"still here"
    with pytest.raises(ValueError, match="closed"):
        memory.view()
    with pytest.raises(ValueError, match="closed"):
        memory.fileno()


def test_a_duplicate_is_independent():
    first = SealedMemory.of(b"shared")
    second = first.dup()
    first.close()
    with second:
        assert bytes(second.view()) == b"shared"


def test_empty_memory_has_an_empty_view():
    with SealedMemory.of(b"") as memory:
        assert len(memory.view()) == 0
        assert memory.sha256() == hashlib.sha256().hexdigest()


def test_memory_file_appends_and_patches():
    with MemoryFile() as file:
        assert file.write(b"head", b"", memoryview(b"tail")) == 8
        file.patch(0, b"HEAD")
        with pytest.raises(ValueError, match="within"):
            file.patch(6, b"past")
        with file.seal() as memory:
            assert bytes(memory.view()) == b"HEADtail"
    with pytest.raises(ValueError, match="sealed or closed"):
        file.write(b"more")


def test_memory_writer_hashes_on_the_way():
    pieces = [b"a" * 10, b"", b"b" * 100_000]
    with MemoryWriter() as writer:
        for piece in pieces:
            writer.write(piece)
        digest = hashlib.sha256(b"".join(pieces)).hexdigest()
        assert writer.hexdigest() == digest
        assert writer.size == 100_010
        with writer.seal() as memory:
            assert memory.sha256() == digest
            verify_sealed(memory.fileno())


def test_memory_writer_is_bounded():
    with MemoryWriter(max_size=10) as writer:
        writer.write(b"x" * 10)
        with pytest.raises(ModelFormatError, match="larger than the 10 bytes"):
            writer.write(b"x")
        assert writer.size == 10


def test_foreign_descriptors_must_be_sealed(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    with open(path, "rb") as file, pytest.raises(ModelFormatError, match="not sealed memory"):
        SealedMemory.from_fd(file.fileno())
    for seals in (0, ALL_SEALS & ~fcntl.F_SEAL_WRITE, ALL_SEALS & ~fcntl.F_SEAL_SHRINK):
        fd = os.memfd_create("foreign", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            with pytest.raises(ModelFormatError, match="not fully sealed"):
                verify_sealed(fd)
        finally:
            os.close(fd)
    reader, writer = os.pipe()
    try:
        with pytest.raises(ModelFormatError):
            verify_sealed(reader)
        with pytest.raises(ModelFormatError, match="neither a file nor memory"):
            MappedBytes.from_fd(reader)
    finally:
        os.close(reader)
        os.close(writer)


def test_only_regular_files_are_mapped(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(ModelFormatError, match="not a regular file"):
        MappedBytes.open(fifo)
    with pytest.raises(FileNotFoundError):
        MappedBytes.open(tmp_path / "missing")


def test_write_all_takes_more_parts_than_one_call(tmp_path):
    parts = [bytes([index % 256]) * (index % 3) for index in range(5000)]
    with open(tmp_path / "file", "wb", buffering=0) as file:
        assert write_all(file.fileno(), *parts) == len(b"".join(parts))
    assert (tmp_path / "file").read_bytes() == b"".join(parts)


def test_write_all_goes_on_after_short_writes():
    reader, writer = os.pipe()
    os.set_blocking(reader, True)
    received = bytearray()
    data = os.urandom(1 << 20)
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        write_all(writer, data[:10], memoryview(data)[10:70_000], data[70_000:])
        os._exit(0)
    os.close(writer)
    while piece := os.read(reader, 1 << 16):
        received += piece
    os.close(reader)
    assert os.waitpid(pid, 0)[1] == 0
    assert received == data


def test_closing_in_a_forked_child_leaves_the_parent_alone():
    with SealedMemory.of(b"parent's") as memory:
        view = memory.view()
        pid = os.fork()
        if pid == 0:
            del view
            memory.close()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert bytes(view) == b"parent's"
        assert bytes(memory.view()) == b"parent's"


def test_descriptors_come_back_without_close():
    gc.collect()
    before = open_descriptors()
    for _ in range(100):
        SealedMemory.of(b"dropped").view()
        MemoryWriter().write(b"dropped")
    gc.collect()
    assert open_descriptors() == before
