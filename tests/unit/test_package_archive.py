"""Unpacking what a server sent."""

from __future__ import annotations

import gzip
import io
import os
import tarfile

import pytest

from scaleout_mp import PackageError
from scaleout_mp.package.archive import ArchiveLimits, checksum_of, unpack


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


def test_checksum(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert checksum_of(str(tmp_path / "x")) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
