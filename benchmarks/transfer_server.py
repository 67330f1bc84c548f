"""A combiner that costs as little as one can, for measuring clients: `transfer_server.py MODEL_FILE`.

It throws away what is uploaded, and answers every download with the file. Prints its port, and ends with its input.
"""

from __future__ import annotations

import hashlib
import sys
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from scaleout_mp.transport.transfer import serialize_chunk
from scaleout_mp.wire import edge_pb2 as pb
from scaleout_mp.wire import methods

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK = 1 << 20


def main() -> None:
    data = Path(sys.argv[1]).read_bytes()
    checksum = hashlib.sha256(data).hexdigest()
    view = memoryview(data)
    chunks = [serialize_chunk(view[at : at + CHUNK]) for at in range(0, len(data), CHUNK)]
    del view, data
    # So that its allocator keeps what messages need: clients are to wait for themselves.
    block = bytes(32 << 20)
    del block

    def upload(requests: Iterator[bytes], _context: Any) -> pb.ModelResponse:
        size = sum(map(len, requests))
        return pb.ModelResponse(status=pb.ModelStatus.OK, message=f"{size} bytes")

    def download(_request: pb.ModelRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        context.set_trailing_metadata((("checksum", checksum),))
        yield from chunks

    handlers = {
        "Upload": grpc.stream_unary_rpc_method_handler(
            upload, response_serializer=methods.UPLOAD.response.SerializeToString
        ),
        "Download": grpc.unary_stream_rpc_method_handler(
            download, request_deserializer=methods.DOWNLOAD.request.FromString
        ),
    }
    options = [("grpc.max_receive_message_length", -1), ("grpc.http2.max_ping_strikes", 0)]
    server = grpc.server(futures.ThreadPoolExecutor(2), options=options)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(methods.MODEL_SERVICE, handlers),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    sys.stdin.read()
    server.stop(None)


if __name__ == "__main__":
    main()
