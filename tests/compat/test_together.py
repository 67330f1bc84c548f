"""This package beside the published ones, in one process; and the generated code, from the same compiler."""

from __future__ import annotations

import subprocess

import pytest
from published import NEEDS_PUBLISHED, PYTHON, ROOT

pytestmark = NEEDS_PUBLISHED
OURS = "import scaleout_mp, scaleout_mp.wire.methods, scaleout_mp.supervisor"
THEIRS = "import scaleoututil.grpc.scaleout_pb2, scaleout"


@pytest.mark.parametrize("order", [(OURS, THEIRS), (THEIRS, OURS)], ids=["ours first", "theirs first"])
def test_both_packages_load_in_one_process(order):
    same_bytes = (
        "from scaleout_mp.wire import edge_pb2 as ours; from scaleoututil.grpc import scaleout_pb2 as theirs; "
        "request = theirs.TaskRequest(correlation_id='c', type='Scaleout_ModelUpdate', data='{}'); "
        "assert ours.TaskRequest.FromString(request.SerializeToString()).correlation_id == 'c'"
    )
    subprocess.run([str(PYTHON), "-c", "; ".join([*order, same_bytes])], check=True, timeout=60, cwd=ROOT)


def test_every_message_has_the_published_numbers():
    code = """
from scaleout_mp.wire import edge_pb2 as ours
from scaleoututil.grpc import scaleout_pb2 as theirs
checked = 0
for name, message in theirs.DESCRIPTOR.message_types_by_name.items():
    mine = ours.DESCRIPTOR.message_types_by_name.get(name)
    if mine is None:
        continue
    for field in message.fields:
        twin = mine.fields_by_number.get(field.number)
        if twin is None:
            continue
        assert (twin.name, twin.type) == (field.name, field.type), (name, field.name)
        checked += 1
assert checked > 60, checked
"""
    subprocess.run([str(PYTHON), "-c", code], check=True, timeout=60, cwd=ROOT)


def test_the_generated_code_is_what_the_compiler_makes(tmp_path):
    command = [
        str(PYTHON),
        "-m",
        "grpc_tools.protoc",
        "-Iprotos",
        f"--python_out={tmp_path}",
        f"--pyi_out={tmp_path}",
    ]
    subprocess.run([*command, "protos/scaleout_mp/wire/edge.proto"], check=True, timeout=60, cwd=ROOT)
    for name in ("edge_pb2.py", "edge_pb2.pyi"):
        made = (tmp_path / "scaleout_mp" / "wire" / name).read_bytes()
        assert made == (ROOT / "scaleout_mp" / "wire" / name).read_bytes(), f"{name}: run `make protos`"
