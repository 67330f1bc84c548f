"""What a child may say, checked field by field before anybody acts on it."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from typing import Any, Final

from scaleout_mp.errors import ProtocolViolation
from scaleout_mp.ipc.channel import close_all
from scaleout_mp.ipc.frames import Frame, Kind
from scaleout_mp.task import (
    AttributesRecord,
    InferenceRecord,
    LogLine,
    MetricRecord,
    Record,
    RecordContext,
    TelemetryRecord,
)

#: Keys of one record.
MAX_KEYS: Final = 4096
#: Characters of one key or id.
MAX_NAME: Final = 1024
#: Characters of one attribute's value.
MAX_VALUE: Final = 1 << 16
#: Characters of the JSON of one result of an inference.
MAX_PAYLOAD: Final = 1 << 18
#: How an error begins that stands for one which kept a callback from being loaded.
CANNOT_LOAD: Final = "the callback cannot be loaded in a task process: "
#: The wire carries steps as UInt32Value.
MAX_STEP: Final = (1 << 32) - 1


class Refusal(enum.StrEnum):
    """A resource that a task asked for and did not get."""

    MEMORY = "memory"
    FILE_SIZE = "file_size"
    OPEN_FILES = "open_files"
    PIDS = "pids"


class StateChange(enum.StrEnum):
    """What became of the state that tasks hand on."""

    #: The task begins to read it, which may run any code.
    OPENING = "opening"
    #: The task has it and may change it.
    OPENED = "opened"
    #: It cannot be unpickled.
    UNREADABLE = "unreadable"
    #: What it is now comes beside the frame.
    KEPT = "kept"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """What the callable raised."""

    error_type: str
    message: str
    traceback: str
    #: What the kernel refused, when that is what was raised.
    refused: Refusal | None = None


RECORD_KINDS: Final = frozenset({Kind.METRIC, Kind.ATTRIBUTES, Kind.TELEMETRY, Kind.INFERENCE, Kind.LOG})


def plain_numbers(values: Any) -> bool:
    """Say whether a record may be sent as it is: a dict of floats, its keys short strings, and not too many."""
    if type(values) is not dict or len(values) > MAX_KEYS:
        return False
    for key, value in values.items():
        if type(value) is not float or type(key) is not str or len(key) > MAX_NAME:
            return False
    return True


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ProtocolViolation(what)


def _fields(frame: Frame, count: int) -> list[Any]:
    close_all(frame.descriptors)
    _require(not frame.descriptors, f"a {frame.kind.name} frame came with descriptors")
    _require(len(frame.fields) == count, f"a {frame.kind.name} frame has {len(frame.fields)} fields, not {count}")
    return frame.fields


def _text(value: Any, most: int, what: str) -> str:
    _require(isinstance(value, str) and len(value) <= most, f"{what} is not a string of at most {most} characters")
    return str(value)


def _timestamp(value: Any) -> float:
    # The bound keeps protobuf's Timestamp, which ends with the year 9999.
    _require(type(value) is float and math.isfinite(value) and 0 <= value < 2.5e11, "a timestamp is none")
    return float(value)


def _numbers(value: Any) -> dict[str, float]:
    _require(
        isinstance(value, dict) and len(value) <= MAX_KEYS,
        f"a record is not a map of at most {MAX_KEYS} keys",
    )
    for key, number in value.items():
        _text(key, MAX_NAME, "a key")
        _require(type(number) is float, "a value is not a float")
    return dict(value)


def _context(value: Any) -> RecordContext | None:
    if value is None:
        return None
    _require(isinstance(value, list) and len(value) == 3, "a context is not three ids")
    ids = [None if part is None else _text(part, MAX_NAME, "an id") for part in value]
    return RecordContext(model_id=ids[0], round_id=ids[1], session_id=ids[2])


def _object(value: Any) -> str:
    text = _text(value, MAX_PAYLOAD, "a payload")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    _require(isinstance(found, dict), "a payload is no JSON object")
    return text


def parse_record(frame: Frame) -> Record:
    """Return the record in a frame of RECORD_KINDS. Raises ProtocolViolation."""
    match frame.kind:
        case Kind.METRIC:
            metrics, step, context, timestamp = _fields(frame, 4)
            _require(
                step is None or (type(step) is int and 0 <= step <= MAX_STEP),
                "a step is no unsigned 32-bit number",
            )
            return MetricRecord(
                metrics=_numbers(metrics),
                step=step,
                timestamp=_timestamp(timestamp),
                context=_context(context),
            )
        case Kind.ATTRIBUTES:
            attributes, timestamp = _fields(frame, 2)
            _require(isinstance(attributes, dict) and len(attributes) <= MAX_KEYS, "attributes are no map")
            for key, value in attributes.items():
                _text(key, MAX_NAME, "a key")
                _text(value, MAX_VALUE, "an attribute")
            return AttributesRecord(attributes=attributes, timestamp=_timestamp(timestamp))
        case Kind.TELEMETRY:
            telemetry, timestamp = _fields(frame, 2)
            return TelemetryRecord(telemetry=_numbers(telemetry), timestamp=_timestamp(timestamp))
        case Kind.INFERENCE:
            key, inference_id, model_id, payload, timestamp = _fields(frame, 5)
            return InferenceRecord(
                key=_text(key, MAX_NAME, "a key"),
                inference_id=_text(inference_id, MAX_NAME, "an id"),
                model_id=_text(model_id, MAX_NAME, "an id"),
                payload=_object(payload),
                timestamp=_timestamp(timestamp),
            )
        case Kind.LOG:
            logger, level, message, timestamp = _fields(frame, 4)
            _require(type(level) is int and 0 <= level <= 1000, "a log level is none")
            return LogLine(
                logger=_text(logger, MAX_NAME, "a logger's name"),
                level=level,
                message=_text(message, MAX_VALUE, "a log message"),
                timestamp=_timestamp(timestamp),
            )
        case _:
            raise ProtocolViolation(f"a {frame.kind.name} frame is no record")


def parse_failure(frame: Frame) -> Failure:
    """Return what a FAILURE frame says. Raises ProtocolViolation."""
    error_type, message, traceback, refused = _fields(frame, 4)
    _require(
        refused is None or (type(refused) is str and refused in set(Refusal)),
        "a failure names a resource that there is not",
    )
    return Failure(
        error_type=_text(error_type, MAX_NAME, "an error's name"),
        message=_text(message, MAX_VALUE, "an error's message"),
        traceback=_text(traceback, 1 << 17, "a traceback"),
        refused=None if refused is None else Refusal(refused),
    )
