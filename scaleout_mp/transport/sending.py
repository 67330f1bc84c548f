"""How a message goes to the combiner: streamed where the server takes streams, else by a call of its own."""

from __future__ import annotations

import json
import logging
import math
import uuid
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.errors import CallError
from scaleout_mp.transport.message import MessageKind
from scaleout_mp.transport.record_streams import RecordStreams
from scaleout_mp.wire import edge_pb2 as pb
from scaleout_mp.wire import methods

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scaleout_mp.transport.calls import CombinerCalls
    from scaleout_mp.transport.message import Ticket
    from scaleout_mp.wire.methods import Method

logger = logging.getLogger(__name__)

#: Of the ids of records, which are made from what a record is: the same after a restart.
_RECORDS: Final = uuid.UUID("6f1d9f6e-6d0c-4a51-9a53-0d3a3c7b8e11")

_STREAMED: Final[Mapping[MessageKind, Method]] = {
    MessageKind.TELEMETRY: methods.STREAM_TELEMETRY_RECORD,
    MessageKind.ATTRIBUTES: methods.STREAM_ATTRIBUTE_RECORD,
    MessageKind.INFERENCE_RESULT: methods.STREAM_INFERENCE_RESULT,
}


class Sender:
    """Sends messages over one connection."""

    def __init__(self, calls: CombinerCalls) -> None:
        self._calls = calls
        self._streams = RecordStreams(calls)

    async def send(self, ticket: Ticket) -> None:
        """Send one message and return once the combiner has it. Raises like `CombinerCalls.once`.

        A CallError with the code UNIMPLEMENTED means that the server has no way to take it.
        """
        streamed = _STREAMED.get(ticket.kind)
        if streamed is not None and self._calls.speaks(streamed):
            try:
                await self._streams.deliver(streamed, records_of(ticket))
            except CallError as error:
                if error.code != "UNIMPLEMENTED":
                    raise
                self._calls.lacks(streamed)
            else:
                return
        if ticket.kind is MessageKind.INFERENCE_RESULT:
            raise CallError("the server takes no results of inference", code="UNIMPLEMENTED")
        await self._calls.once(ticket.kind.value, ticket.packed)

    async def aclose(self) -> None:
        """End the streams."""
        await self._streams.aclose()


def records_of(ticket: Ticket) -> dict[str, bytes]:
    """Return what a message is as streamed records, by id: one for each key. The same message gives the same ids."""
    if ticket.kind is MessageKind.INFERENCE_RESULT:
        return {pb.InferenceResult.FromString(ticket.packed).inference_result_id: ticket.packed}
    if ticket.kind is MessageKind.TELEMETRY:
        telemetry = pb.TelemetryMessage.FromString(ticket.packed)
        return {
            (number := _record_id(ticket, elem.key)): pb.TelemetryRecord(
                telemetry_id=number,
                client_id=telemetry.client_id,
                timestamp=telemetry.timestamp,
                key=elem.key,
                payload=_payload(elem.value),
            ).SerializeToString()
            for elem in telemetry.telemetries
        }
    attributes = pb.AttributeMessage.FromString(ticket.packed)
    return {
        (number := _record_id(ticket, elem.key)): pb.AttributeRecord(
            attribute_id=number,
            client_id=attributes.client_id,
            timestamp=attributes.timestamp,
            key=elem.key,
            payload=_payload(elem.value),
        ).SerializeToString()
        for elem in attributes.attributes
    }


def _record_id(ticket: Ticket, key: str) -> str:
    # All of it stands in the journal, and no two messages of a client share it: a number is given anew only once
    # nothing waits, and then the time stamp is another one.
    return str(uuid.uuid5(_RECORDS, f"{ticket.lane}\n{ticket.id}\n{key}\n{ticket.packed.hex()}"))


def _payload(value: Any) -> str:
    # JSON has no NaN; a figure that ran away is null, as elsewhere.
    return json.dumps({"value": None if isinstance(value, float) and not math.isfinite(value) else value})
