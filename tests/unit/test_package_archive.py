"""Unpacking what a server sent."""

from __future__ import annotations

import concurrent.futures
import fcntl
import gzip
import io
import os
import tarfile
import threading

import pytest

from scaleout_mp import PackageError
from scaleout_mp.package.archive import ArchiveLimits, checksum_of, unpack
from scaleout_mp.transport.package_api import RemoteArchive


def member(name, *, kind=tarfile.REGTYPE, link="", mode=0o644, data=b""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode, info.size = kind, link, mode, len(data)
    return info, data


def archive(path, *members, mode="w:gz", **options):
    with tarfile.open(path, mode, **options) as file:
        for info, data in members:
            file.addfile(info, io.BytesIO(data))
    return str(path)


FILE = member("client/scaleout.yaml", data=b"entry_points: {}\n")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_files_folders_and_links_inside_are_unpacked(tmp_path, mode):
    path = archive(
        tmp_path / "a",
        member("client", kind=tarfile.DIRTYPE, mode=0o755),
        FILE,
        member("./client/run.sh", data=b"x" * 100_000, mode=0o6755),
        member("client/link.yaml", kind=tarfile.SYMTYPE, link="scaleout.yaml"),
        mode=mode,
    )
    unpack(path, str(tmp_path / "out"))
    client = tmp_path / "out" / "client"
    assert (client / "link.yaml").read_bytes() == FILE[1]
    assert (client / "run.sh").read_bytes() == b"x" * 100_000
    assert (client / "run.sh").stat().st_mode & 0o7777 == 0o755
    assert sorted(os.listdir(tmp_path)) == ["a", "out"]


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (member("/etc/evil", data=b"x"), "leads out"),
        (member("../evil", data=b"x"), "leads out"),
        (member("client/../../evil", data=b"x"), "leads out"),
        (member("client/evil", kind=tarfile.SYMTYPE, link="/etc/passwd"), "leads out"),
        (member("client/evil", kind=tarfile.SYMTYPE, link="../../x"), "leads to"),
        (member("client/evil", kind=tarfile.LNKTYPE, link="/etc/passwd"), "neither"),
        (member("client/evil", kind=tarfile.LNKTYPE, link="client/scaleout.yaml"), "neither"),
        (member("client/evil", kind=tarfile.CHRTYPE), "neither"),
        (member("client/evil", kind=tarfile.BLKTYPE), "neither"),
        (member("client/evil", kind=tarfile.FIFOTYPE), "neither"),
        (member("client/scaleout.yaml", data=b"other"), "twice"),
        (member("client/scaleout.yaml/x", data=b"other"), "cannot be unpacked"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0].name,
)
def test_what_is_dangerous_is_refused_and_nothing_is_left(tmp_path, bad, told):
    (tmp_path / "in").mkdir()
    path = archive(tmp_path / "a.tgz", FILE, bad)
    with pytest.raises(PackageError, match=told):
        unpack(path, str(tmp_path / "in" / "out"))
    assert os.listdir(tmp_path / "in") == []
    assert not (tmp_path / "evil").exists()


def test_no_chain_of_links_leads_out(tmp_path):
    path = archive(
        tmp_path / "a.tgz",
        FILE,
        member("here", kind=tarfile.SYMTYPE, link="."),
        member("up", kind=tarfile.SYMTYPE, link="here/../../evil"),
    )
    with pytest.raises(PackageError, match="leads to"):
        unpack(path, str(tmp_path / "out"))


def test_what_is_written_through_a_link_stays_inside(tmp_path):
    path = archive(tmp_path / "a.tgz", FILE, member("l", kind=tarfile.SYMTYPE, link="client"), member("l/x", data=b"1"))
    unpack(path, str(tmp_path / "out"))
    assert (tmp_path / "out" / "client" / "x").read_bytes() == b"1"


def test_sizes_and_counts_are_bounded(tmp_path):
    many = archive(tmp_path / "many.tgz", *(member(f"f{index}") for index in range(20)))
    with pytest.raises(PackageError, match="more than 10 entries"):
        unpack(many, str(tmp_path / "out"), limits=ArchiveLimits(max_entries=10))
    # A kilobyte that says it is a gigabyte.
    bomb = archive(tmp_path / "bomb.tgz", member("zeros", data=bytes(64 << 20)))
    assert os.path.getsize(bomb) < 1 << 20
    with pytest.raises(PackageError, match="more than 1048576 bytes"):
        unpack(bomb, str(tmp_path / "out"), limits=ArchiveLimits(max_bytes=1 << 20))
    long_name = archive(tmp_path / "name.tgz", member("n" * (8 << 20)), format=tarfile.GNU_FORMAT)
    with pytest.raises(PackageError, match="header"):
        unpack(long_name, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["no archive", "cut", "cut inside gzip", "empty"])
def test_what_is_broken_is_refused(tmp_path, how):
    path = archive(tmp_path / "a.tgz", FILE, member("big", data=os.urandom(100_000)))
    whole = (tmp_path / "a.tgz").read_bytes()
    broken = {
        "no archive": b"<html>not found</html>" * 100,
        "cut": gzip.compress(gzip.decompress(whole)[:50_000]),
        "cut inside gzip": whole[:50_000],
        "empty": b"",
    }[how]
    (tmp_path / "a.tgz").write_bytes(broken)
    with pytest.raises(PackageError, match="archive"):
        unpack(path, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def sparse(size):
    """Return the header of a file of so many zeros, none of which is in the archive."""
    info = tarfile.TarInfo("client/zeros")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    for place in (386, 483):
        header[place : place + 12] = b"%011o\0" % size
    header[398:410] = b"%011o\0" % 0
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return bytes(header)


@pytest.mark.parametrize(
    ("headers", "told"),
    [
        ([sparse(1 << 32)], "sparse"),
        ([member("x", kind=b"L", data=b"name\0")] * 2000, "RecursionError"),
        ([member("/".join("a" * 100), data=b"")], "folders deep"),
    ],
    ids=["a sparse bomb", "headers of headers", "deep"],
)
def test_what_would_fill_the_disk_or_the_stack_is_refused(tmp_path, headers, told):
    with open(tmp_path / "a.tar", "wb") as file:
        for each in headers:
            data = b"" if isinstance(each, bytes) else each[1]
            file.write(each if isinstance(each, bytes) else each[0].tobuf(tarfile.GNU_FORMAT))
            file.write(data + bytes(-len(data) % 512))
        file.write(bytes(1024))
    (tmp_path / "in").mkdir()
    with pytest.raises(PackageError, match=told):
        unpack(str(tmp_path / "a.tar"), str(tmp_path / "in" / "out"))
    assert os.listdir(tmp_path / "in") == []


def test_folders_that_no_entry_names_count_as_well(tmp_path):
    path = archive(tmp_path / "a.tgz", *(member(f"{index}/a/a/a/x") for index in range(3)))
    unpack(path, str(tmp_path / "out"), limits=ArchiveLimits(max_entries=15))
    with pytest.raises(PackageError, match="more than 14 entries"):
        unpack(path, str(tmp_path / "other"), limits=ArchiveLimits(max_entries=14))


class Api:
    """Gives out an archive, and counts to whom."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self._data = file.read()
        self._checksum = checksum_of(path)
        self.downloads = 0

    def current(self):
        return RemoteArchive(name="client.tgz", checksum=self._checksum)

    def download(self, path, *, most):
        self.downloads += 1
        with open(path, "wb") as file:
            for start in range(0, len(self._data), 10_000):
                file.write(self._data[start : start + 10_000])
                file.flush()


def test_two_clients_that_load_the_same_package_into_one_folder_both_get_it(tmp_path):
    pytest.importorskip("yaml", reason="PyYAML is not installed: `make install` has it")
    from scaleout_mp.package import RemotePackage

    manifest = member("client/scaleout.yaml", data=b"entry_points: {startup: startup.py}\n")
    path = archive(tmp_path / "a.tgz", manifest, member("client/startup.py", data=os.urandom(500_000)))
    api, together = Api(path), threading.Barrier(2)
    # Of one that was killed.
    (tmp_path / "folders" / ".unpacking-x" / "client").mkdir(parents=True)

    def make_ready():
        together.wait(10)
        return RemotePackage(api, archives=tmp_path / "archives", folders=tmp_path / "folders").make_ready()

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        first, second = [future.result() for future in [threads.submit(make_ready) for _ in range(2)]]
    assert first == second
    assert api.downloads == 1
    assert os.listdir(tmp_path / "archives") == [f"{checksum_of(path)[:16]}-client.tgz"]
    assert os.listdir(tmp_path / "folders") == [checksum_of(path)[:32]]


def test_a_wait_for_another_client_is_broken_off(tmp_path):
    pytest.importorskip("yaml", reason="PyYAML is not installed: `make install` has it")
    from scaleout_mp.package import RemotePackage

    api = Api(archive(tmp_path / "a.tgz", FILE))
    (tmp_path / "archives").mkdir()
    other = os.open(tmp_path / "archives", os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        package = RemotePackage(api, archives=tmp_path / "archives", folders=tmp_path / "folders")
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            waits = threads.submit(package.make_ready)
            while not waits.done():
                # Before it began to wait, the first may be forgotten.
                package.close()
                concurrent.futures.wait([waits], timeout=0.05)
            with pytest.raises(PackageError, match="the client ended"):
                waits.result()
    finally:
        os.close(other)
    assert api.downloads == 0


def test_checksum(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert checksum_of(str(tmp_path / "x")) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
