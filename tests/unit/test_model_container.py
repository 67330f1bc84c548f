"""The archive reader and writer against hostile and unusual bytes."""

import io
import json
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scaleout_mp.errors import ModelFormatError
from scaleout_mp.model import ScaleoutModel, get_helper
from scaleout_mp.model import zip_reader as zf
from scaleout_mp.model.checksums import crc32, crc32_combine
from scaleout_mp.model.container import MAX_NESTING, ContainerLimits
from scaleout_mp.model.deflate import COMPRESSIONS
from scaleout_mp.model.entry_sink import EntrySink
from scaleout_mp.model.memfd import MappedBytes, MemoryFile
from scaleout_mp.model.zip_writer import COMBINE_FROM, ZipWriter, _central_record

LIMITS = zf.ArchiveLimits()
META = b'{"model_id": "m"}'


def archive_of(entries, compression=zipfile.ZIP_DEFLATED) -> bytearray:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return bytearray(target.getvalue())


def load(data: bytes, **limits) -> ScaleoutModel:
    return ScaleoutModel.from_stream(io.BytesIO(data), limits=ContainerLimits(**limits))


def read_all(data: bytes) -> dict[str, bytes]:
    view = memoryview(data)
    entries = zf.read_directory(view, LIMITS)
    return {name: bytes(zf.read_entry(entry.raw(view), entry, verify=True)) for name, entry in entries.items()}


# A busy machine is no failure.
relaxed = settings(deadline=None)

names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)
contents = st.dictionaries(names, st.binary(max_size=2000), max_size=5)


@relaxed
@given(contents, st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
def test_reads_what_the_standard_library_writes(entries, compression):
    assert read_all(archive_of(entries.items(), compression)) == entries


@relaxed
@given(contents, st.booleans(), st.sampled_from(COMPRESSIONS))
def test_the_standard_library_reads_what_is_written(entries, align, compression):
    with MemoryFile() as file:
        writer = ZipWriter(file)
        for index, (name, data) in enumerate(entries.items()):
            if index % 2:
                writer.add(name, data[:10], data[10:], align=align)
            else:
                with EntrySink(writer, file, name, compression) as entry:
                    entry.write(data[:10])
                    entry.write(data[10:])
        writer.finish()
        with file.seal() as memory:
            written = bytes(memory.view())
    assert read_all(written) == entries
    with zipfile.ZipFile(io.BytesIO(written)) as archive:
        assert archive.testzip() is None
        assert {info.filename: archive.read(info) for info in archive.infolist()} == entries


@relaxed
@given(st.binary(max_size=300), st.binary(max_size=300))
def test_crc_combine(first, second):
    assert crc32_combine(crc32(first), crc32(second), len(second)) == zlib.crc32(first + second)


def test_crc_combine_over_more_than_four_gigabytes():
    # zlib's own crc32_combine gives this for 5 GiB of zeros appended, built up here by doubling.
    crc, length = zlib.crc32(bytes(1 << 20)), 1 << 20
    while length < 5 << 30:
        crc, length = crc32_combine(crc, crc, length), 2 * length
    half = crc32_combine(zlib.crc32(b"x"), crc, length)
    again = zlib.crc32(b"x")
    for _ in range(8):
        again = crc32_combine(again, zlib_zeros(length // 8), length // 8)
    assert half == again


def zlib_zeros(length: int) -> int:
    crc, done = zlib.crc32(bytes(1 << 20)), 1 << 20
    while done < length:
        crc, done = crc32_combine(crc, crc, done), 2 * done
    return crc


def test_large_entries_are_stored_with_the_right_sum():
    data = np.random.default_rng(1).bytes(COMBINE_FROM + 7)
    with MemoryFile() as file:
        outer = ZipWriter(file)
        with EntrySink(outer, file, "inner.zip", "stored") as sink:
            inner = ZipWriter(sink)
            inner.add("large", data)
            inner.add("small", b"x")
            inner.finish()
        outer.finish()
        with file.seal() as memory:
            nested = read_all(bytes(memory.view()))["inner.zip"]
    assert read_all(nested) == {"large": data, "small": b"x"}


def test_more_entries_than_sixteen_bits_count():
    with MemoryFile() as file:
        writer = ZipWriter(file)
        for index in range(66_000):
            writer.add(str(index), b"")
        writer.finish()
        with file.seal() as memory:
            entries = zf.read_directory(memory.view(), zf.ArchiveLimits(max_entries=66_000))
            assert len(entries) == 66_000
            assert len(zipfile.ZipFile(io.BytesIO(memory.view())).namelist()) == 66_000
            with pytest.raises(ModelFormatError, match="66000 entries; 4096 are allowed"):
                zf.read_directory(memory.view(), LIMITS)


def test_offsets_beyond_four_gigabytes(tmp_path):
    """A sparse file: the hole costs neither disk nor memory."""
    path = tmp_path / "big.zip"
    hole = 5 << 30
    with open(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("first", b"1")
        archive.start_dir += hole
        archive.writestr("last", b"2")
    with MappedBytes.open(path) as source:
        view = source.view()
        entries = zf.read_directory(view, LIMITS)
        assert entries["last"].header_offset > 4 << 30
        assert bytes(zf.read_entry(entries["last"].raw(view), entries["last"], verify=True)) == b"2"
        with MemoryFile() as file:
            writer = ZipWriter(file)
            writer.add_raw(source, entries["last"])
            writer.finish()
            with file.seal() as copied:
                assert read_all(bytes(copied.view())) == {"last": b"2"}


def test_headers_of_entries_beyond_four_gigabytes():
    big = (5 << 30) + 1
    entry = zf.ZipEntry(
        name="w", method=0, crc=1, compressed_size=big, size=big, header_offset=big, data_offset=big + 51
    )
    record = _central_record(entry)
    extra = record[zf.CENTRAL.size + 1 :]
    assert struct.unpack("<2H3Q", extra) == (1, 24, big, big, big)
    assert ZipWriter._header(entry, wide=True)[-20:] == struct.pack("<2H2Q", 1, 16, big, big)


def patched(data: bytearray, offset: int, layout: str, value: int) -> bytearray:
    struct.pack_into(layout, data, offset, value)
    return data


def central(data: bytearray, index: int = 0) -> int:
    at = -1
    for _ in range(index + 1):
        at = data.index(zf.CENTRAL_MAGIC, at + 1)
    return at


def container(compression=zipfile.ZIP_DEFLATED) -> bytearray:
    return archive_of([("metadata.json", META), ("training_model.bin", b"w" * 1000)], compression)


HOSTILE = {
    "encrypted": (lambda d: patched(d, central(d) + 8, "<H", 1), "encrypted"),
    "method": (lambda d: patched(d, central(d) + 10, "<H", 12), "method 12"),
    "symlink": (lambda d: patched(d, central(d, 1) + 38, "<L", 0o120777 << 16), "symbolic link"),
    "bomb": (lambda d: patched(d, central(d, 1) + 24, "<L", 3 << 30), "further than deflate can"),
    "declares less": (lambda d: patched(d, central(d, 1) + 24, "<L", 999), "more than its declared size"),
    "declares more": (lambda d: patched(d, central(d, 1) + 24, "<L", 1001), "cut off"),
    "crc": (lambda d: patched(d, central(d, 1) + 16, "<L", 0), "CRC"),
    "overlap": (
        lambda d: patched(d, central(d, 1) + 42, "<L", 0),
        "disagree|overlaps",
    ),
    "offset outside": (lambda d: patched(d, central(d, 1) + 42, "<L", len(d)), "outside"),
    "into directory": (lambda d: patched(d, central(d, 1) + 20, "<L", 5000), "into the archive's directory"),
    "disk": (lambda d: patched(d, central(d, 1) + 34, "<H", 1), "split"),
    "zip64 lacking": (lambda d: patched(d, central(d, 1) + 24, "<L", 0xFFFFFFFF), "ZIP64"),
    "name differs": (lambda d: d.replace(b"training_model", b"training_modem", 1), "disagree"),
    "directory size": (lambda d: patched(d, len(d) - 10, "<L", 1), "not where"),
    "entry count": (lambda d: patched(patched(d, len(d) - 12, "<H", 3), len(d) - 14, "<H", 3), "cut off"),
    "entry count low": (
        lambda d: patched(patched(d, len(d) - 12, "<H", 1), len(d) - 14, "<H", 1),
        "more than its entries",
    ),
    "truncated": (lambda d: d[:-1], "cut off"),
    "beginning only": (lambda d: d[:3], "cut off"),
    "prefixed": (lambda d: b"junk" + d, "not where"),
    "empty": (lambda _d: b"", "empty"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives_are_refused(case):
    change, reason = HOSTILE[case]
    with pytest.raises(ModelFormatError, match=reason):
        load(bytes(change(container()))).get_training_model_stream()


def test_duplicate_names_are_refused():
    with pytest.warns(UserWarning, match="Duplicate"):
        data = archive_of([("metadata.json", META), ("metadata.json", META)])
    with pytest.raises(ModelFormatError, match="occurs twice"):
        load(data)


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../../b", "c\\d", "files/../x", "files/a/b", "files/.."])
def test_names_that_lead_outside_are_refused(name):
    with pytest.raises(ModelFormatError, match=r"outside|plain"):
        load(archive_of([("metadata.json", META), (name, b"")]))


def test_limits_are_parameters():
    data = container()
    with pytest.raises(ModelFormatError, match="2 entries; 1 are allowed"):
        load(data, max_entries=1)
    with pytest.raises(ModelFormatError, match="inflate to more than the 500 bytes"):
        load(data, max_inflated=500)
    stored = container(zipfile.ZIP_STORED)
    assert load(stored, max_inflated=0).get_training_model_stream().read() == b"w" * 1000
    with pytest.raises(ModelFormatError, match=r"metadata.json is larger than the 10 bytes"):
        load(data, max_metadata=10)


def test_limits_reach_the_arrays():
    weights = io.BytesIO()
    np.savez_compressed(weights, **{str(index): np.zeros(1000) for index in range(3)})
    data = archive_of(
        [("metadata.json", b'{"helper_type": "numpyhelper"}'), ("training_model.bin", weights.getvalue())]
    )
    assert len(load(data).get_training_model()) == 3
    with pytest.raises(ModelFormatError, match="3 entries; 2 are allowed"):
        load(data, max_arrays=2).get_training_model()
    # What the entry takes is no longer there for the arrays in it.
    with pytest.raises(ModelFormatError, match="inflate to more than"):
        load(data, max_inflated=24_500).get_training_model()
    helper = get_helper("numpyhelper")
    with pytest.raises(ModelFormatError, match="2 are allowed"):
        helper.load(weights.getvalue(), limits=zf.ArchiveLimits(max_entries=2))


@pytest.mark.parametrize(
    "metadata",
    [
        b"[]",
        b"null",
        b"{",
        b"\xff\xfe",
        b'{"model_id": 5}',
        b'{"helper_type": []}',
        b'{"_version": "2"}',
        b'{"_version": true}',
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"a": ' + b"9" * 10_000 + b"}",
        # Python reads these, and fails to copy or to write them.
        b'{"a":' + b"[" * 100 + b"]" * 100 + b"}",
        b'{"a":' + b"[" * 600 + b"]" * 600 + b"}",
    ],
)
def test_metadata_must_be_an_object_of_the_right_kinds(metadata):
    with pytest.raises(ModelFormatError, match=r"metadata\.json"):
        load(archive_of([("metadata.json", metadata)]))


def nested_lists(levels):
    value = []
    for _ in range(levels - 1):
        value = [value]
    return value


@pytest.mark.parametrize("levels", [MAX_NESTING, 600, 5000])
def test_metadata_nested_too_deep_are_refused_when_a_model_is_built(levels):
    with pytest.raises(TypeError, match="metadata must"):
        ScaleoutModel.from_training_model([], metadata={"a": nested_lists(levels)})


def test_metadata_nested_as_deep_as_is_allowed_survive():
    deepest = nested_lists(MAX_NESTING - 1)
    with ScaleoutModel.from_training_model([], metadata={"a": deepest}) as model:
        changed = ScaleoutModel.from_stream(model.get_file_stream()).to_builder().set_metadata("b", 1).build()
        assert changed.metadata["a"] == deepest


def test_names_too_long_to_be_written_again_are_refused():
    """In cp437 a name may have bytes that take three each in UTF-8."""
    data = archive_of([("metadata.json", META), ("files/" + "A" * 40_000, b"")])
    with load(data) as model:
        model.to_builder().set_model_id("m").build().close()
    with pytest.raises(ModelFormatError, match="no usable name"):
        load(data.replace(b"A" * 40_000, b"\xb0" * 40_000))


def test_a_bomb_is_never_inflated_past_its_declared_size():
    data = archive_of([("metadata.json", META), ("training_model.bin", bytes(64 << 20))])
    assert len(data) < 100_000
    at = central(data, 1)
    patched(data, at + 24, "<L", 1 << 10)
    with pytest.raises(ModelFormatError, match="more than its declared size"):
        load(data).get_training_model_stream()


def test_verification_takes_little_memory():
    data = archive_of([("metadata.json", META), ("training_model.bin", bytes(256 << 20))])
    with load(data) as model:
        tracemalloc.start()
        try:
            model.verify()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 8 << 20


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
reserved = {"model_id", "helper_type", "inference_model_format", "_version"}


@relaxed
@given(
    st.dictionaries(
        st.just("version") | st.text().filter(lambda key: key not in reserved), st.just(2) | json_values, max_size=5
    )
)
@example({"version": 2})
@example({"a": 1, "version": 2})
def test_metadata_round_trip(metadata):
    with ScaleoutModel.from_training_model([], metadata=metadata) as model:
        expected = {
            **json.loads(json.dumps(metadata)),
            "helper_type": "numpyhelper",
            "model_id": model.model_id,
        }
        assert model.metadata == expected
        with ScaleoutModel.from_stream(model.get_file_stream()) as loaded:
            assert loaded.metadata == expected
