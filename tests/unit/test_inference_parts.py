"""The pure parts of inference: arguments that are not pickled, JSON of arrays, how long a worker is left alone."""

from __future__ import annotations

import math
import mmap
import os
import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from observing import wait_until

from scaleout_mp import ConfigError, Limits
from scaleout_mp.client import inference_calls
from scaleout_mp.client.calls import RequestInfo
from scaleout_mp.client.values import MAX_JSON, json_value
from scaleout_mp.errors import ModelError, ValueNotSendable
from scaleout_mp.ipc import arguments, values
from scaleout_mp.ipc.lent import Borrowed, Lender, LentMemory
from scaleout_mp.supervisor.staged_model import inference_plan
from scaleout_mp.supervisor.worker_trouble import WorkerTrouble
from scaleout_mp.transport.backoff import Backoff

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st_numpy.arrays(st_numpy.scalar_dtypes(), st_numpy.array_shapes(max_dims=3, max_side=3)),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(0, 9), inner),
    max_leaves=12,
)


def same(left, right):
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    return type(left) is type(right) and left == right


def through(packed):
    descriptors = list(packed.descriptors)
    packed.descriptors.clear()
    args, kwargs = arguments.unpack(packed.table, descriptors)
    assert kwargs == {}
    return args


@given(PLAIN)
def test_plain_arguments_arrive_as_they_were(value):
    packed = arguments.pack_plain([value, "x"])
    args = through(packed)
    assert same(args, (value, "x"))
    assert packed.model_bytes == 0


def test_arrays_are_not_pickled_and_belong_to_the_callee():
    array = np.asfortranarray(np.arange(40_000.0).reshape(200, 200))
    packed = arguments.pack_plain([{"x": array, "flag": True}])
    assert packed.table[2:] == ["plain"]
    assert packed.memory_bytes > array.nbytes
    (value,) = through(packed)
    assert same(value["x"], array)
    assert value["x"].flags.f_contiguous
    value["x"][0, 0] = 7
    assert array[0, 0] == 0


class Odd(dict):
    """A subclass that has to arrive as one."""


@pytest.mark.parametrize(
    "value", [Odd(a=1), np.float32(2), {1, 2}, 2**70, np.ma.masked_array([1, 2], [0, 1]), complex(1, 2)]
)
def test_what_is_not_plain_is_pickled(value):
    packed = arguments.pack_plain([[value]])
    assert packed.table[2:] == []
    ((arrived,),) = through(packed)
    assert type(arrived) is type(value)
    assert np.all(arrived == value)


def test_arrays_of_other_packages_dtypes_stay_what_they_are():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="the extra dev has it, this environment does not")
    array = np.arange(6).astype(ml_dtypes.bfloat16)
    packed = arguments.pack_plain([array])
    (arrived,) = through(packed)
    assert arrived.dtype == array.dtype
    assert np.all(arrived == array)
    with pytest.raises(ValueNotSendable, match="dtype bfloat16 cannot be returned"):
        values.encode(array)
    # Its mask would be lost.
    with pytest.raises(ValueNotSendable, match="masked"):
        values.encode(np.ma.masked_array([1, 2], [0, 1]))


@pytest.mark.parametrize(
    ("value", "told"), [(1 << 64, "64 bits"), (-(1 << 63) - 1, "64 bits"), ("\ud800", "surrogate")]
)
def test_what_cannot_cross_is_told_before(value, told):
    with pytest.raises(ValueError, match=rf"v\[0\] is a .*{told}"):
        json_value([value], path="v")
    assert json_value([(1 << 64) - 1, -(1 << 63), "\U0001f600"], path="v") == [(1 << 64) - 1, -(1 << 63), "\U0001f600"]


def test_lent_memory_is_not_let_go_once_its_borrower_was_forked():
    lent = LentMemory(1 << 20)
    sizes = lent.fill([b"x" * 100])
    borrowed = Borrowed(os.dup(lent.fileno()))
    views = borrowed.segments(sizes)
    # What it leaves is nobody's child any more, and would not be found.
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    del views
    assert not borrowed.let_go()
    again = Borrowed(os.dup(lent.fileno()))
    assert again.let_go()
    lent.close()


def test_arrays_become_lists_where_that_is_wanted():
    value = {"x": np.array([[1.5, np.nan]]), "n": (np.int8(3), np.array(4)), "t": [np.array([True])]}
    assert json_value(value, path="v", arrays=True) == {"x": [[1.5, None]], "n": [3, 4], "t": [[True]]}
    with pytest.raises(TypeError, match=r"tolist"):
        json_value(value, path="v")
    with pytest.raises(TypeError, match=r"v\['c'\]\[0\] is of type complex"):
        json_value({"c": np.array([1j])}, path="v", arrays=True)
    # Before it is made a list of.
    with pytest.raises(ValueError, match=r"v\[0\] is an array of 1000000000 elements"):
        json_value([np.broadcast_to(np.float64(1), 10**9)], path="v", arrays=True)
    endless = []
    endless.append(endless)
    with pytest.raises(TypeError, match="contains itself"):
        json_value(endless, path="v", arrays=True)
    assert MAX_JSON < 10**9


def test_a_worker_that_dies_again_and_again_is_left_alone_for_longer_and_longer():
    trouble = WorkerTrouble(Backoff(first=0.25, cap=30, jitter=0))
    assert trouble.wait(0) == 0
    waits = []
    now = 100.0
    for _ in range(10):
        trouble.died("crashed", now, ready=False)
        waits.append(trouble.wait(now))
        now += waits[-1]
        assert trouble.wait(now) == 0
    assert waits == [0, 0.25, 0.5, 1, 2, 4, 8, 16, 30, 30]
    assert (trouble.deaths, trouble.said) == (10, "crashed")
    trouble.lived()
    trouble.died("crashed again", now, ready=False)
    assert trouble.wait(now) == 0
    for _ in range(8):
        trouble.died("was asked something bad", now, ready=True)
    assert trouble.wait(now) == 0.5


def test_a_process_without_a_model_says_so(monkeypatch):
    monkeypatch.setattr(inference_calls, "_staged", None)
    request = RequestInfo(type="t", correlation_id="c", model_id="m", round_id="", session_id="")
    call = inference_calls.InferenceCall(lambda model, parameters: (model, parameters))
    with pytest.raises(ModelError, match="no staged model"):
        call({}, False, request)
    inference_calls.StageCall(None)("a model", request)
    assert call({"a": 1}, False, {**vars(request)}) == ("a model", {"a": 1})
    assert call({"a": math.inf}, True, request) == (["a model", {"a": None}], "")
    inference_calls.StageCall(None)(None, request)
    assert call(1, False, request) == ("a model", 1)


def test_the_limits_of_staging_and_of_requests():
    general, own = Limits(memory="1GiB", wall_time=600, no_progress=60), Limits(memory="2GiB", wall_time=1, cpu_time=1)
    plan = inference_plan(cache_dir="c", concurrency=2, idle_time="10m", limits=general, request_limits=own)
    assert plan.idle_seconds == 600
    assert plan.limits == own
    assert plan.staging_limits == Limits(memory="2GiB", wall_time=600, no_progress=60)
    alone = inference_plan(cache_dir="c", concurrency=1, idle_time=None, limits=general, request_limits=None)
    assert alone.limits == alone.staging_limits == general
    with pytest.raises(ConfigError, match="inference_concurrency"):
        inference_plan(cache_dir="c", concurrency=True, idle_time=None, limits=general, request_limits=None)


class TestLentMemory:
    def lent(self, lender, value):
        return arguments.pack_plain([value], lend=lambda size: lender.lend("m", size))

    def test_it_is_used_again_once_nothing_refers_to_it(self):
        lender = Lender()
        first = self.lent(lender, np.arange(200_000))
        memory = first.lent
        args = through(first)
        assert (args[0] == np.arange(200_000)).all()
        held = args[0][5:7]
        del args
        assert not arguments.let_go()
        assert held.tolist() == [5, 6]
        del held
        lender.take_back("m", memory)
        second = self.lent(lender, [np.zeros(150_000), "x", b""])
        assert second.lent is memory
        args = through(second)
        assert same(args[0], [np.zeros(150_000), "x", b""])
        args[0][0][0] = 7
        del args
        assert arguments.let_go()
        assert not arguments.let_go()
        # Nobody else gets it, and nothing that would leave most of it unused.
        lender.take_back("m", memory)
        assert lender.lend("n", memory.size) is not memory
        assert lender.lend("m", memory.size // 5) is not memory
        assert lender.lend("m", memory.size + 1) is not memory
        assert self.lent(lender, np.zeros(1000)).lent is None
        lender.close()

    def test_who_borrows_it_can_only_read(self):
        memory = LentMemory(1 << 20)
        path = f"/proc/self/fd/{memory.fileno()}"
        for act in (
            lambda: os.write(memory.fileno(), b"x"),
            lambda: os.ftruncate(memory.fileno(), 0),
            lambda: mmap.mmap(memory.fileno(), 1 << 20),
            lambda: os.truncate(path, 1 << 21),
        ):
            with pytest.raises(PermissionError):
                act()
        sizes = memory.fill([b"abc", memoryview(np.full(100, 3, np.uint8))])
        borrowed = Borrowed(os.dup(memory.fileno()))
        texts = [bytes(view) for view in borrowed.segments(sizes)]
        assert texts == [b"abc", b"\x03" * 100]
        assert borrowed.let_go()
        memory.close()

    def test_a_child_process_may_refer_to_it(self):
        memory = LentMemory(1 << 20)
        borrowed = Borrowed(os.dup(memory.fileno()))
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
            assert not borrowed.let_go()
            child.stdin.close()
            child.wait()
            assert borrowed.let_go()
        memory.close()

    def test_what_nobody_was_lent_for_long_is_given_up(self):
        lender = Lender(keep_seconds=0.2)
        memory = lender.lend("m", 1 << 20)
        lender.take_back("m", memory)
        descriptor = memory.fileno()
        inode = os.fstat(descriptor).st_ino
        wait_until(lambda: not _is_open(descriptor, inode), seconds=10)
        assert lender.lend("m", 1 << 20) is not memory
        lender.close()
        other = LentMemory(1 << 20)
        lender.take_back("m", other)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(other.fileno())


def _is_open(descriptor, inode):
    try:
        return os.fstat(descriptor).st_ino == inode
    except OSError:
        return False
