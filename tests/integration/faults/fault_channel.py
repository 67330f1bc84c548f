"""The control channel in the hands of somebody who breaks its rules."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import time

import msgpack
from fault_catalogue import fault

from scaleout_mp import EndReason, Limits, current_task

CRASHED, PROTOCOL, COMPLETED, FAILED = EndReason.CRASHED, EndReason.PROTOCOL, EndReason.COMPLETED, EndReason.FAILED
WALL = Limits(wall_time=0.2, abort_grace=0.1)
#: The channel's descriptor, and the kinds of frames, as numbers: that is what a hostile program has.
CHANNEL = 3
METRIC, ATTRIBUTES, TELEMETRY, LOG, RESULT, FAILURE, PROGRESS = range(16, 23)
TASK, ABORT, SETUP, START, READY, STARTED, EXITED = 1, 2, 32, 34, 48, 50, 52


def _frame(*parts):
    body = msgpack.packb(list(parts))
    return struct.pack("<I", len(body)) + body


def _write(data):
    view = memoryview(data)
    while view:
        view = view[os.write(CHANNEL, view) :]


def _send_and_wait(data):
    _write(data)
    time.sleep(1_000)


def _metric(name="loss", value=1.0, step=1, moment=1.0):
    return _frame(METRIC, 0, {name: value}, step, None, moment)


def _result(value):
    return _frame(RESULT, 0, [False, [msgpack.packb(value)]])


def _pass(descriptors, data=b"\0"):
    """Send descriptors beside bytes."""
    with socket.socket(fileno=os.dup(CHANNEL)) as channel:
        rights = array.array("i", descriptors)
        channel.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])


# --- Not whole --------------------------------------------------------------------------------------------------------


@fault(CRASHED, says="code 0 before it returned a result")
def half_a_frame_and_out(_):
    _write(_result("whole")[:-1])
    os._exit(0)


@fault(EndReason.WALL_TIME, limits=WALL)
def half_a_frame_and_silence(_):
    _send_and_wait(_result("whole")[:-1])


@fault(EndReason.NO_PROGRESS, limits=Limits(no_progress=0.3, abort_grace=0.1))
def a_frame_byte_by_byte(_):
    for byte in _frame(LOG, 0, "x" * 100_000, 10, "x", 1.0):
        _write(bytes([byte]))
        time.sleep(0.01)


@fault(EndReason.WALL_TIME, limits=WALL)
def a_length_without_a_frame(_):
    _send_and_wait(struct.pack("<I", 1 << 20))


@fault(PROTOCOL, says="bytes, over the bound")
def a_giant_length(_):
    _send_and_wait(struct.pack("<I", (1 << 32) - 1) + b"x" * 100_000)


@fault(PROTOCOL)
def an_empty_frame(_):
    _send_and_wait(struct.pack("<I", 0))


@fault(PROTOCOL)
def random_bytes(_):
    # Its length is within the bound, so that all of it is read.
    _send_and_wait(struct.pack("<I", 4096) + os.urandom(4096))


@fault(PROTOCOL)
def zeros_for_ever(_):
    with contextlib.suppress(OSError):
        while True:
            os.write(CHANNEL, bytes(1 << 16))
    time.sleep(1_000)


# --- Not what it says -------------------------------------------------------------------------------------------------


@fault(PROTOCOL)
def an_array_that_says_it_has_billions_of_elements(_):
    _send_and_wait(struct.pack("<I", 5) + b"\xdd\xff\xff\xff\xff")


@fault(PROTOCOL)
def arrays_in_arrays(_):
    _send_and_wait(struct.pack("<I", 100_000) + b"\x91" * 100_000)


@fault(PROTOCOL, says="unknown kind")
def an_unknown_kind(_):
    _send_and_wait(_frame(999, 0))


@fault(PROTOCOL)
def a_kind_that_is_no_number(_):
    _send_and_wait(_frame([16], 0))


@fault(PROTOCOL, says="a task sent EXITED")
def the_templates_words(_):
    _send_and_wait(_frame(EXITED, 0, current_task().task_id, {"code": 0}))


@fault(PROTOCOL, says="a task sent ABORT")
def the_supervisors_words(_):
    _send_and_wait(_frame(ABORT, 0, "stop yourself"))


@fault(PROTOCOL)
def a_metric_that_is_text(_):
    _send_and_wait(_metric(value="much"))


@fault(PROTOCOL)
def a_metric_without_end(_):
    _send_and_wait(_frame(METRIC, 0, [[]] * 1000, 1, None, 1.0))


@fault(PROTOCOL, says="a key is not a string of at most")
def a_name_of_a_megabyte(_):
    _send_and_wait(_metric(name="x" * 1_000_000))


@fault(FAILED, error="ValueError", says="a key is longer than")
def a_name_of_ten_megabytes(_):
    current_task().log_metric({"x" * 10_000_000: 1.0})


@fault(PROTOCOL, says="not msgpack")
def a_name_that_is_not_text(_):
    body = b"\x96\x10\x00\x81\xa2\xff\xfe\xcb" + struct.pack(">d", 1.0) + b"\x01\xc0\xcb" + struct.pack(">d", 1.0)
    _send_and_wait(struct.pack("<I", len(body)) + body)


@fault(PROTOCOL)
def names_beyond_number(_):
    _send_and_wait(_frame(METRIC, 0, {str(number): 1.0 for number in range(5000)}, 1, None, 1.0))


@fault(PROTOCOL)
def a_step_below_zero(_):
    _send_and_wait(_metric(step=-1))


@fault(PROTOCOL)
def a_step_past_the_wire(_):
    _send_and_wait(_metric(step=1 << 32))


@fault(PROTOCOL, says="a timestamp is none")
def a_time_that_is_no_number(_):
    _send_and_wait(_metric(moment=float("nan")))


@fault(PROTOCOL, says="a timestamp is none")
def a_time_after_all_times(_):
    _send_and_wait(_metric(moment=1e300))


@fault(COMPLETED, returns="done")
def metrics_that_are_no_numbers(_):
    task = current_task()
    task.log_metric({"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}, step=0)
    task.log_telemetry({"nan": float("nan")})
    return "done"


@fault(COMPLETED, returns="done")
def names_of_odd_characters(_):
    task = current_task()
    task.log_metric({"\0": 1.0, "": 2.0, "\n\r\x1b[2J": 3.0, "\U0010ffff": 4.0})
    task.log_attributes({"\x1b]0;pwned\x07": "\0"})
    return "done"


@fault(FAILED, error="UnicodeEncodeError")
def a_name_of_half_a_character(_):
    current_task().log_metric({"\ud800": 1.0})


@fault(PROTOCOL)
def a_failure_that_is_none(_):
    _send_and_wait(_frame(FAILURE, 0, 1, 2, 3, 4))


@fault(PROTOCOL)
def a_failure_of_a_resource_that_there_is_not(_):
    _send_and_wait(_frame(FAILURE, 0, "E", "m", "t", "patience"))


@fault(FAILED, error="MemoryError", says="raised MemoryError: it was the limit, I swear")
def a_failure_that_blames_a_limit_it_does_not_have(_):
    _write(_frame(FAILURE, 0, "MemoryError", "it was the limit, I swear", "", "memory"))
    time.sleep(1_000)


# --- Too much of it ---------------------------------------------------------------------------------------------------


@fault(COMPLETED, returns="spoofed")
def a_result_made_by_hand(_):
    """A task may say what its result is, in whatever way it says it."""
    _write(_result("spoofed"))
    os._exit(0)


@fault(COMPLETED, returns="first", note="after the result was in")
def a_result_twice(_):
    _send_and_wait(_result("first") + _result("second"))


@fault(COMPLETED, returns="first", note="after the result was in")
def a_result_and_a_thousand_failures(_):
    with contextlib.suppress(OSError):
        _write(_result("first") + _frame(FAILURE, 0, "E", "m", "t", None) * 1000)
    time.sleep(1_000)


@fault(COMPLETED, returns="first", note="after the result was in")
def a_result_and_garbage(_):
    with contextlib.suppress(OSError):
        _write(_result("first") + os.urandom(1 << 20))
    time.sleep(1_000)


@fault(COMPLETED, returns="first")
def a_result_and_metrics_after_it(_):
    _write(_result("first") + _metric() * 10)
    os._exit(0)


@fault(FAILED, error="E")
def a_failure_and_a_result_after_it(_):
    with contextlib.suppress(OSError):
        _write(_frame(FAILURE, 0, "E", "m", "t", None) + _result("second"))
    time.sleep(1_000)


# --- No channel -------------------------------------------------------------------------------------------------------


@fault(CRASHED, says="code 1 before it returned a result")
def a_closed_channel(_):
    os.close(CHANNEL)
    return "nobody hears it"


@fault(CRASHED, says="code 1 before it returned a result")
def a_channel_that_is_shut_down(_):
    with socket.socket(fileno=os.dup(CHANNEL)) as channel:
        channel.shutdown(socket.SHUT_RDWR)
    return "nobody hears it"


@fault(CRASHED, says="before it returned a result")
def another_file_in_the_channels_place(_):
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, CHANNEL)
    return "nobody hears it"


@fault(CRASHED, says="before it returned a result")
def another_socket_in_the_channels_place(_):
    ours, theirs = socket.socketpair()
    os.dup2(theirs.fileno(), CHANNEL)
    ours.detach()
    return "nobody hears it"


@fault(CRASHED, says="before it returned a result")
def everything_closed(_):
    os.closerange(0, 1 << 16)
    return "nobody hears it"


@fault(EndReason.WALL_TIME, limits=WALL)
def closed_channel_and_silence(_):
    os.close(CHANNEL)
    time.sleep(1_000)


@fault(COMPLETED, returns="done")
def a_channel_in_a_child(_):
    """A child that keeps a copy, and writes into it."""
    copy = os.dup(CHANNEL)
    pid = os.fork()
    if pid == 0:
        os.write(copy, _metric())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(copy)
    return "done"


# --- Descriptors ------------------------------------------------------------------------------------------------------


def _flood(descriptors, data):
    with contextlib.suppress(OSError):
        while True:
            _pass(descriptors, data)
    time.sleep(1_000)


def _memory():
    """Return a descriptor of the only kind that may come at all."""
    return os.memfd_create("fault", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


@fault(PROTOCOL, says="descriptors came that no frame announced")
def descriptors_that_no_frame_announces(_):
    # Each beside a byte of a frame that never becomes whole.
    _write(struct.pack("<I", 1 << 20))
    _flood([_memory()] * 60, b"\0")


@fault(PROTOCOL)
def two_hundred_descriptors_at_once(_):
    _flood([0] * 250, _metric())


@fault(PROTOCOL, says="came with descriptors")
def a_metric_with_descriptors(_):
    _pass([_memory()] * 3, _frame(METRIC, 3, {"x": 1.0}, 1, None, 1.0))
    time.sleep(1_000)


@fault(PROTOCOL, says="announces descriptors that did not come")
def descriptors_that_do_not_come(_):
    _send_and_wait(_frame(RESULT, 5, [True, [5]]))


@fault(PROTOCOL)
def the_channel_through_the_channel(_):
    """Descriptors of a socket in the queue of the same socket: a cycle that only the kernel can collect."""
    for _ in range(20):
        _pass([CHANNEL] * 30, _frame(METRIC, 30, {"x": 1.0}, 1, None, 1.0))
    time.sleep(1_000)


@fault(PROTOCOL, says="a PROGRESS frame came with descriptors")
def progress_with_descriptors(_):
    _flood([_memory()] * 60, _frame(PROGRESS, 60))
