"""Helpers: arrays to bytes and back, and the aggregators' arithmetic."""

import io
import struct
import warnings
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from scaleout_mp.errors import ModelFormatError
from scaleout_mp.model import ScaleoutModel, get_helper, register_helper
from scaleout_mp.model.helpers import _helpers
from scaleout_mp.model.npz import EncodedArray, decode_array, read_arrays

# A busy machine is no failure.
relaxed = settings(deadline=None)

numpyhelper = get_helper("numpyhelper")

dtypes = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?"),
    hnp.complex_number_dtypes(endianness="?"),
    hnp.datetime64_dtypes(endianness="?"),
    hnp.timedelta64_dtypes(endianness="?"),
    hnp.byte_string_dtypes(endianness="?"),
    hnp.unicode_string_dtypes(endianness="?"),
    hnp.array_dtypes(hnp.floating_dtypes() | hnp.integer_dtypes()),
)
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


@st.composite
def arrays(draw):
    array = draw(hnp.arrays(draw(dtypes), draw(shapes)))
    layout = draw(st.sampled_from(["as it is", "fortran", "every second"]))
    if layout == "fortran":
        return np.asfortranarray(array)
    if layout == "every second" and array.ndim:
        return array[..., ::2]
    return array


def same(first, second) -> bool:
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and first.tobytes() == np.ascontiguousarray(second).reshape(second.shape).tobytes()
    )


@relaxed
@given(st.lists(arrays(), max_size=5))
def test_any_list_of_arrays_survives(weights):
    with ScaleoutModel.from_training_model(weights) as model:
        loaded = model.get_training_model()
        with np.load(io.BytesIO(model.get_training_model_stream().read()), allow_pickle=False) as by_numpy:
            reference = [by_numpy[str(index)] for index in range(len(weights))]
    assert len(loaded) == len(weights)
    for array, original, numpys in zip(loaded, weights, reference, strict=True):
        assert same(array, original)
        assert same(array, numpys)
        assert not array.flags.writeable
        assert array.flags.aligned
        assert array.flags.f_contiguous == numpys.flags.f_contiguous


@relaxed
@given(st.lists(arrays(), max_size=3))
@pytest.mark.filterwarnings("ignore:Stored array in format")
def test_what_numpy_writes_is_read(weights):
    for save in (np.savez, np.savez_compressed):
        target = io.BytesIO()
        save(target, **{str(index): array for index, array in enumerate(weights)})
        loaded = numpyhelper.load(target.getvalue())
        assert all(map(same, loaded, weights))


def test_fortran_order_is_kept_without_a_copy():
    array = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    assert np.shares_memory(np.frombuffer(EncodedArray(array).data, np.uint8), array)


def test_custom_sixteen_bit_floats_come_as_raw_views():
    raw = np.array([1, 2, 3], np.uint16).view("V2")
    with ScaleoutModel.from_training_model([raw, np.ones(2, np.float16)]) as model:
        loaded = model.get_training_model()
    assert loaded[0].dtype == np.dtype("V2")
    assert loaded[0].view(np.uint16).tolist() == [1, 2, 3]
    assert loaded[1].dtype == np.float16


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "int4"])
def test_extension_types_come_back_as_raw_views(name):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="the extra dev has it, this environment does not")
    array = np.arange(6).astype(getattr(ml_dtypes, name)).reshape(2, 3)
    with ScaleoutModel.from_training_model([array, array[:, ::2], np.asfortranarray(array)]) as model:
        loaded = model.get_training_model()
    assert {read.dtype for read in loaded} == {np.dtype(f"V{array.itemsize}")}
    assert loaded[0].view(array.dtype).tolist() == array.tolist()
    assert loaded[1].view(array.dtype).tolist() == array[:, ::2].tolist()
    assert loaded[2].T.view(array.dtype).T.tolist() == array.tolist()


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize("compression", ["auto", "stored", "deflate"])
def test_subclasses_come_back_as_plain_arrays(compression):
    table = np.arange(12.0).reshape(3, 4)
    records = np.rec.array(np.zeros(3, [("a", "<f4"), ("b", ">i2")]))
    weights = [np.asmatrix(table), np.asmatrix(np.asfortranarray(table)), np.ma.masked_array(table, table > 3), records]
    with ScaleoutModel.from_training_model(weights, compression=compression) as model:
        read = model.get_training_model()
    for array in read[:3]:
        assert type(array) is np.ndarray
        assert array.tolist() == table.tolist()
    assert read[3].tolist() == records.tolist()


def test_objects_are_refused_in_both_directions():
    with pytest.raises(ModelFormatError, match="array 1 has the dtype object"):
        ScaleoutModel.from_training_model([np.zeros(1), np.array([object()])])
    target = io.BytesIO()
    np.savez(target, **{"0": np.array([{"a": 1}], dtype=object)})
    with pytest.raises(ModelFormatError, match="not a plain one"):
        numpyhelper.load(target.getvalue())
    structured = np.zeros(1, [("a", "O")])
    np.savez(target := io.BytesIO(), **{"0": structured})
    with pytest.raises(ModelFormatError, match="dtype"):
        numpyhelper.load(target.getvalue())


def npy(header: str, data: bytes = b"") -> memoryview:
    encoded = header.encode("latin1")
    return memoryview(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(encoded)) + encoded + data)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "1",
        "{}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'more': 1}",
        "{'descr': '<f4', 'fortran_order': 0, 'shape': (1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': [1]}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (True,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1,) * 3}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 9223372036854775807, 9223372036854775807)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1," * 65 + ")}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': 'os.system', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<f3', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<M8[xx]', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': None, 'fortran_order': False, 'shape': (1,)}",
        "{'descr': [('a',)], 'fortran_order': False, 'shape': (1,)}",
        "{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,)}",
        "{'descr': [('a', '<f4'), ('a', '<f4')], 'fortran_order': False, 'shape': (1,)}",
        "(" * 5000,
        "__import__('os').getpid()",
    ],
)
def test_malformed_headers_are_refused(header):
    with pytest.raises(ModelFormatError):
        decode_array(npy(header, b"\0" * 4))


def test_a_header_that_python_would_remark_on_is_refused_in_silence():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(ModelFormatError):
            decode_array(npy("{'descr': '<f4', 'fortran_order': 1or 2, 'shape': '\\d'}"))
    assert not seen


@relaxed
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data):
    for attempt in (read_arrays, decode_array):
        with pytest.raises(ModelFormatError):
            attempt(memoryview(data))


@relaxed
@given(st.data())
def test_damaged_headers_are_refused_or_harmless(data):
    encoded = EncodedArray(np.arange(3, dtype=np.int32))
    header, body = encoded.header, encoded.data
    damaged = bytearray(header + bytes(body))
    for index in data.draw(st.lists(st.integers(0, len(header) - 1), min_size=1, max_size=5)):
        damaged[index] = data.draw(st.integers(0, 255))
    try:
        array = decode_array(memoryview(damaged))
    except ModelFormatError:
        return
    assert array.nbytes == 12


def test_arrays_must_be_numbered_from_zero():
    target = io.BytesIO()
    np.savez(target, np.zeros(1))
    with pytest.raises(ModelFormatError, match=r"lack 0\.npy"):
        numpyhelper.load(target.getvalue())


def test_stored_members_of_other_writers_are_aligned():
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("0.npy", b"".join(EncodedArray(np.arange(5.0)).blocks()))
    for shift in range(1, 9):
        shifted = memoryview(b"\0" * shift + target.getvalue())[shift:]
        (array,) = numpyhelper.load(shifted)
        assert array.flags.aligned
        assert not array.flags.writeable
        assert array.tolist() == [0, 1, 2, 3, 4]


def test_weights_must_be_a_list():
    for bad in ({"a": np.zeros(1)}, "text"):
        with pytest.raises(TypeError, match="list of arrays"):
            ScaleoutModel.from_training_model(bad)


@pytest.mark.parametrize(
    ("name", "weights", "expected"),
    [
        ("numpyhelper", [np.arange(3)], [[0, 1, 2]]),
        ("binaryhelper", [np.arange(2), np.ones((1, 2))], [[0, 1, 1, 1]]),
        ("androidhelper", [0.5, 1.5], [0.5, 1.5]),
    ],
)
def test_save_and_load_by_path_file_and_model(name, weights, expected, tmp_path):
    helper = get_helper(name)
    path = tmp_path / "weights"
    helper.save(weights, path)
    buffer = io.BytesIO()
    helper.save(weights, buffer)
    assert buffer.getvalue() == path.read_bytes()
    with open(path, "rb") as file:
        results = [helper.load(str(path)), helper.load(file), helper.load(buffer.getvalue())]
    with ScaleoutModel.from_training_model(weights, helper=helper) as model:
        assert model.metadata["helper_type"] == name
        results.append(model.get_training_model())
        with ScaleoutModel.from_stream(model.get_file_stream()) as loaded:
            results.append(loaded.get_training_model())
    for result in results:
        assert [np.asarray(item).tolist() for item in result] == expected


def test_flat_vectors_of_broken_length_are_refused():
    with pytest.raises(ModelFormatError, match="whole number of float64"):
        get_helper("binaryhelper").load(b"1234567")
    assert get_helper("binaryhelper").load(b"")[0].shape == (0,)


def test_flat_vectors_of_other_writers_are_aligned():
    data = memoryview(b"\0" + np.arange(3.0).tobytes())[1:]
    (vector,) = get_helper("binaryhelper").load(data)
    assert vector.tolist() == [0, 1, 2]
    assert vector.flags.aligned
    assert not vector.flags.writeable


def test_arithmetic():
    m1 = [np.array([1.0, 4.0]), np.array([[9.0]])]
    m2 = [np.array([3.0, 2.0]), np.array([[1.0]])]

    def values(result):
        return [array.tolist() for array in result]

    assert values(numpyhelper.increment_average(m1, m2, 1, 4)) == [[1.5, 3.5], [[7.0]]]
    assert values(numpyhelper.add(m1, m2)) == [[4, 6], [[10]]]
    assert values(numpyhelper.add(m1, m2, 2.0, 0.5)) == [[3.5, 9], [[18.5]]]
    assert values(numpyhelper.subtract(m1, m2)) == [[-2, 2], [[8]]]
    assert values(numpyhelper.multiply(m1, m2)) == [[3, 8], [[9]]]
    assert values(numpyhelper.divide(m2, m1)) == [[3, 0.5], [[1 / 9]]]
    assert values(numpyhelper.sqrt(m1)) == [[1, 2], [[3]]]
    assert values(numpyhelper.power(m1, 2)) == [[1, 16], [[81]]]
    assert values(numpyhelper.sign([np.array([-2.0, 0.0])])) == [[-1, 0]]
    assert values(numpyhelper.ones(m1, 3)) == [[3, 3], [[3]]]
    assert numpyhelper.norm(m1) == 14
    with pytest.raises(ValueError, match="zip"):
        numpyhelper.add(m1, m2[:1])


def test_arithmetic_of_one_vector():
    android = get_helper("androidhelper")
    m1, m2 = [1.0, 4.0], np.array([3.0, 2.0])
    assert android.increment_average(m1, m2, 1, 4).tolist() == [1.5, 3.5]
    assert android.add(m1, m2).tolist() == [4, 6]
    assert android.subtract(m1, m2, 2.0, 1.0).tolist() == [-1, 6]
    assert android.multiply(m1, m2).tolist() == [3, 8]
    assert android.divide(m1, m2).tolist() == [1 / 3, 2]
    assert android.sqrt(m1).tolist() == [1, 2]
    assert android.power(m1, 2).tolist() == [1, 16]
    assert android.sign([-2.0, 0.0]).tolist() == [-1, 0]
    assert android.ones(m1, 3).tolist() == [3, 3]
    assert android.norm([-1.0, 4.0]) == 5


def test_increment_average_is_the_weighted_mean():
    rng = np.random.default_rng(0)
    models = [[rng.normal(size=3).astype(np.float32)] for _ in range(4)]
    counts = [5, 1, 7, 3]
    average, total = models[0], counts[0]
    for model, count in zip(models[1:], counts[1:], strict=True):
        total += count
        average = numpyhelper.increment_average(average, model, count, total)
    expected = np.average([model[0] for model in models], axis=0, weights=counts)
    np.testing.assert_allclose(average[0], expected, rtol=1e-6)
    assert average[0].dtype == np.float32


def test_a_helper_of_ones_own():
    class TextHelper:
        name = "texthelper"

        def save(self, weights, target, /):
            target.write(weights.encode())

        def load(self, source, /):
            return source.read().decode()

    helper = TextHelper()
    register_helper(helper)
    try:
        model = ScaleoutModel.from_training_model("some text", helper=helper)
        assert ScaleoutModel.from_stream(model.get_file_stream()).get_training_model() == "some text"
    finally:
        del _helpers["texthelper"]
    with pytest.raises(ModelFormatError, match="no helper is named 'texthelper'"):
        ScaleoutModel.from_stream(model.get_file_stream()).get_training_model()
    with pytest.raises(TypeError, match="save and load"):
        register_helper(object())
    with pytest.raises(TypeError, match=r"register TextHelper\(\), not the class"):
        register_helper(TextHelper)
    helper.name = 5
    with pytest.raises(TypeError, match="must be a string, not int"):
        register_helper(helper)


def test_the_name_of_a_helper_is_no_helper():
    with pytest.raises(TypeError, match=r"'numpyhelper' is no helper.*get_helper\('numpyhelper'\) gives the one"):
        ScaleoutModel.from_training_model([np.ones(2)], "numpyhelper")
    with ScaleoutModel.from_training_model([np.ones(2)]) as model:
        with pytest.raises(TypeError, match="get_helper"):
            model.get_training_model("numpyhelper")
        with pytest.raises(TypeError, match="5 is no helper"):
            model.to_builder().set_helper(5)
