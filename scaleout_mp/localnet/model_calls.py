"""The model service: uploads and downloads, streamed to and from files."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NoReturn

from scaleout_mp.errors import ModelFormatError
from scaleout_mp.localnet.events import ModelDownloaded, ModelUploaded
from scaleout_mp.localnet.faults import Fault
from scaleout_mp.wire import edge_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from scaleout_mp.localnet.combiner import Call
    from scaleout_mp.localnet.parts import NetworkParts

_NO_FAULT = Fault()


def serialize_chunk(data: bytes) -> bytes:
    """Return `data` as a serialised FileChunk.

    By hand, because building the message first would copy the bytes once more: field 1, length-delimited.
    """
    head = bytearray(b"\x0a")
    length = len(data)
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return b"".join((head, data))


class ModelCalls:
    """Behaviour of the calls of ModelService."""

    def __init__(self, parts: NetworkParts) -> None:
        self._parts = parts

    async def upload(self, chunks: AsyncIterator[pb.FileChunk], call: Call) -> pb.ModelResponse:
        """Receive a model; the answer says FAILED, with the reason, when it is not kept."""
        fault = call.fault or _NO_FAULT
        metadata = {str(key): str(value) for key, value in call.context.invocation_metadata() or ()}
        model_id = metadata.get("model-id", "")
        size = 0
        try:
            with self._parts.models.receive(model_id, call.client_id) as receiver:
                async for chunk in chunks:
                    await receiver.write(chunk.data)
                    size = receiver.size
                    if fault.hang is not None and size >= fault.hang:
                        await for_ever()
                if fault.hang is not None:
                    await for_ever()
                if fault.refuse:
                    raise ModelFormatError(fault.details)  # noqa: TRY301 - the same way out as a real refusal
                await receiver.finish(metadata.get("checksum"))
        except ModelFormatError as error:
            return self._uploaded(call, model_id, size, accepted=False, message=str(error))
        return self._uploaded(call, model_id, size, accepted=True, message="OK")

    def _uploaded(self, call: Call, model_id: str, size: int, *, accepted: bool, message: str) -> pb.ModelResponse:
        self._parts.log.emit(
            ModelUploaded(client_id=call.client_id, model_id=model_id, size=size, accepted=accepted, message=message)
        )
        return pb.ModelResponse(status=pb.OK if accepted else pb.FAILED, message=message)

    async def download(self, request: pb.ModelRequest, call: Call) -> AsyncIterator[bytes]:
        """Stream a model; its checksum follows as trailing metadata."""
        models = self._parts.models
        fault = call.fault or _NO_FAULT
        checksum = await models.checksum(request.model_id)
        if not fault.omit_checksum:
            call.context.set_trailing_metadata((("checksum", checksum),))
        sent = 0
        async for chunk in models.chunks(request.model_id):
            data = bytes((chunk[0] ^ 1,)) + chunk[1:] if fault.corrupt and not sent else chunk
            if fault.hang is not None and sent >= fault.hang:
                await for_ever()
            if fault.truncate is not None:
                data = data[: fault.truncate - sent]
            if not data:
                return
            yield data
            sent += len(data)
        self._parts.log.emit(ModelDownloaded(client_id=call.client_id, model_id=request.model_id, size=sent))


async def for_ever() -> NoReturn:
    """Wait until the call is cancelled: its client gave up, or the network ends."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError("nobody sets what nobody else has")
