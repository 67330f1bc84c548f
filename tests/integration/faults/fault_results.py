"""Results that are too much, are not what they say, or cannot be read."""

from __future__ import annotations

import array
import fcntl
import io
import os
import socket
import struct
import time
import zipfile

import msgpack
import numpy as np
from fault_catalogue import fault

from scaleout_mp import EndReason, ScaleoutModel

PROTOCOL, COMPLETED, FAILED = EndReason.PROTOCOL, EndReason.COMPLETED, EndReason.FAILED
NOT_SENDABLE = {"error": "ValueNotSendable"}
MIB = 1 << 20
_ALL_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
RESULT = 20


def _send(table, descriptors):
    body = msgpack.packb([RESULT, len(descriptors), table])
    with socket.socket(fileno=os.dup(3)) as channel:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        channel.sendmsg([struct.pack("<I", len(body)) + body], rights if descriptors else [])
    time.sleep(1_000)


def _memory(data, seals=_ALL_SEALS):
    descriptor = os.memfd_create("result", os.MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(data)
    if seals:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def _model_in(descriptor):
    """Send a result that is one model: its tree says "model 0", which is the descriptor beside it."""
    _send([False, [msgpack.packb(msgpack.ExtType(3, msgpack.packb(0)))]], [descriptor])


def _container():
    """Return the bytes of a real model."""
    with ScaleoutModel.from_training_model([np.ones(1000, np.float32)]) as model:
        return b"".join(bytes(chunk) for chunk in model.iter_chunks())


# --- Too much ---------------------------------------------------------------------------------------------------------


@fault(COMPLETED, peak=300 * MIB)
def an_array_of_200_megabytes(_):
    return np.zeros(200 * MIB, np.uint8)


@fault(FAILED, **NOT_SENDABLE, says="at most")
def a_string_that_is_too_long(_):
    return "x" * (65 * MIB)


@fault(FAILED, **NOT_SENDABLE, says="arrays")
def five_thousand_arrays(_):
    return [np.zeros(1)] * 5000


@fault(FAILED, **NOT_SENDABLE, says="models")
def seventeen_models(_):
    model = ScaleoutModel.from_training_model([np.ones(3)])
    return [model] * 17


@fault(FAILED, **NOT_SENDABLE)
def a_list_that_holds_itself(_):
    value = []
    value.append(value)
    return value


@fault(FAILED, **NOT_SENDABLE)
def a_tuple_in_tuples(_):
    value = ()
    for _ in range(1000):
        value = (value,)
    return value


# --- Not of a kind that can be sent -----------------------------------------------------------------------------------


@fault(FAILED, **NOT_SENDABLE, says="builtins.object")
def an_object(_):
    return object()


@fault(FAILED, **NOT_SENDABLE)
def a_function(_):
    return lambda: None


@fault(FAILED, **NOT_SENDABLE, says="dtype object")
def an_array_of_objects(_):
    return np.array([object()], dtype=object)


@fault(FAILED, **NOT_SENDABLE)
def a_number_that_is_too_large(_):
    return 2**70


@fault(FAILED, **NOT_SENDABLE)
def half_a_character(_):
    return "\ud800"


class _Liar(dict):
    def items(self):
        raise SystemExit

    def __iter__(self):
        raise SystemExit

    def keys(self):
        raise SystemExit


@fault(FAILED, error="SystemExit")
def a_dict_that_exits(_):
    return _Liar(a=1)


class _Changing(dict):
    def __len__(self):
        return 1 << 30


@fault(COMPLETED)
def a_dict_that_lies_about_its_length(_):
    return _Changing(a=1)


class _Model(ScaleoutModel):
    def fileno(self):
        return 0


@fault(COMPLETED)
def a_model_that_lies_about_its_descriptor(_):
    model = ScaleoutModel.from_training_model([np.ones(3)])
    model.__class__ = _Model
    return model


# --- Not what it says -------------------------------------------------------------------------------------------------


@fault(PROTOCOL)
def a_model_that_can_still_be_written(_):
    _model_in(_memory(_container(), seals=0))


@fault(PROTOCOL)
def a_model_that_can_still_shrink(_):
    _model_in(_memory(_container(), seals=fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW))


@fault(PROTOCOL)
def a_model_that_is_a_file(place):
    with open(f"{place.folder}/model", "wb") as file:
        file.write(_container())
    _model_in(os.open(f"{place.folder}/model", os.O_RDONLY))


@fault(PROTOCOL)
def a_model_that_is_a_folder(place):
    _model_in(os.open(place.folder, os.O_RDONLY))


@fault(PROTOCOL)
def a_model_that_is_a_pipe(_):
    reader, _writer = os.pipe()
    _model_in(reader)


@fault(PROTOCOL)
def a_model_that_is_a_device(_):
    _model_in(os.open("/dev/zero", os.O_RDONLY))


@fault(PROTOCOL)
def a_model_that_is_a_path(place):
    _model_in(os.open(place.folder, os.O_PATH))


@fault(PROTOCOL)
def a_model_of_nothing(_):
    _model_in(_memory(b""))


@fault(PROTOCOL)
def a_model_that_is_cut_off(_):
    _model_in(_memory(_container()[:-100]))


@fault(PROTOCOL)
def a_model_with_a_flipped_bit(_):
    data = bytearray(_container())
    data[len(data) // 3] ^= 1
    _model_in(_memory(data))


@fault(PROTOCOL)
def a_model_that_is_noise(_):
    _model_in(_memory(os.urandom(100_000)))


@fault(PROTOCOL)
def a_model_that_swells(_):
    """256 MiB of zeros in a quarter of one."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("model.bin", "w") as entry:
        for _ in range(16):
            entry.write(bytes(16 * MIB))
    _model_in(_memory(packed.getvalue()))


@fault(PROTOCOL, says="not fit its bytes")
def an_array_of_more_than_came(_):
    packed = msgpack.packb(msgpack.ExtType(2, msgpack.packb(["<f8", [1 << 40], "C", 1])))
    _send([False, [packed, b"12345678"]], [])


@fault(PROTOCOL)
def an_array_of_pointers(_):
    packed = msgpack.packb(msgpack.ExtType(2, msgpack.packb(["|O", [1], "C", 1])))
    _send([False, [packed, b"12345678"]], [])


@fault(PROTOCOL)
def sizes_that_overflow(_):
    _send([True, [1 << 63, 1 << 63]], [_memory(b"x" * 4096)])


@fault(PROTOCOL)
def a_table_that_is_none(_):
    _send("no table", [])


@fault(PROTOCOL)
def segments_that_can_still_be_written(_):
    _send([True, [64]], [_memory(b"x" * 64, seals=0)])
