"""Directives and tasks read one by one, so that a task that cannot be read costs no other."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from scaleout_mp.wire import edge_pb2 as pb

_TASKS: Final = pb.CombinerDirective.DESCRIPTOR.fields_by_name["tasks"].number
#: Every field of a task is a string.
_TEXTS: Final = {field.number: field.name for field in pb.TaskRequest.DESCRIPTOR.fields}
#: protobuf's wire type of strings, bytes and messages.
_LENGTH_DELIMITED: Final = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadTask:
    """A task as far as it could be read."""

    request: pb.TaskRequest
    #: Why the rest could not be read, in one line; empty when all could.
    problem: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Directive:
    """The tasks of one answer to a poll."""

    tasks: tuple[ReadTask, ...]
    #: Why the answer as a whole could not be read; empty when it could.
    problem: str = ""


def read_directive(data: bytes) -> Directive:
    """Read an answer to a poll. Raises nothing: what cannot be read says so."""
    try:
        whole = pb.CombinerDirective.FromString(data)
    except DecodeError:
        pass
    else:
        return Directive(tasks=tuple(ReadTask(request=request) for request in whole.tasks))
    try:
        parts = _fields(data)
    except DecodeError as error:
        return Directive(tasks=(), problem=f"the combiner's answer is no directive: {error}")
    return Directive(tasks=tuple(read_task(part) for number, part in parts if number == _TASKS))


def read_task(data: bytes) -> ReadTask:
    """Read one task. Raises nothing: what cannot be read says so."""
    try:
        return ReadTask(request=pb.TaskRequest.FromString(data))
    except DecodeError as error:
        request, broken = pb.TaskRequest(), []
        try:
            parts = _fields(data)
        except DecodeError:
            return ReadTask(request=request, problem=f"the server sent a task that cannot be read: {error}")
    for number, part in parts:
        name = _TEXTS.get(number)
        if name is None:
            continue
        try:
            setattr(request, name, part.decode())
        except UnicodeDecodeError:
            broken.append(name)
    return ReadTask(
        request=request, problem=f"the server sent a task whose {' and '.join(broken)} cannot be read: no UTF-8"
    )


def _fields(data: bytes) -> list[tuple[int, bytes]]:
    """Return number and content of a message's strings and messages, whatever is in them. Raises DecodeError."""
    # Iterable by index, which its type stub does not know.
    fields: Any = UnknownFieldSet(Empty.FromString(data))
    return [(field.field_number, field.data) for field in fields if field.wire_type == _LENGTH_DELIMITED]
