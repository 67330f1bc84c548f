"""The combiner of a local network: the gRPC server, and what holds for every call on it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import socket
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio

from scaleout_mp.errors import LocalNetworkError, ModelFormatError, ModelNotFoundError
from scaleout_mp.localnet.combiner_calls import CombinerCalls
from scaleout_mp.localnet.model_calls import ModelCalls, for_ever, serialize_chunk
from scaleout_mp.wire import methods

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterator

    from scaleout_mp.localnet.certificates import ServerTls
    from scaleout_mp.localnet.faults import Fault, FaultPlan
    from scaleout_mp.localnet.parts import NetworkParts, Release
    from scaleout_mp.wire.methods import Method

logger = logging.getLogger(__name__)

_OPTIONS: Final = (
    # Two servers on one port would share the clients between them; a port in use must be an error.
    ("grpc.so_reuseport", 0),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Clients ping every 5 s, without calls too; by default a server answers that with GOAWAY "too many pings".
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
    # Our own pings find dead peers behind an open TaskStream.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)

#: Seconds that calls in flight have when the server stops.
_STOP_GRACE: Final = 0.5


def _why_not(host: str, port: int) -> str:
    """Return why an address cannot be listened on: the operating system says it, gRPC does not."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen()
    except OSError as error:
        return error.strerror or str(error)
    return "gRPC refuses it"


def _credentials(tls: ServerTls) -> grpc.ServerCredentials:
    pair = tls.own.key.read_bytes(), tls.own.certificate.read_bytes()
    roots = None if tls.clients_from is None else tls.clients_from.read_bytes()
    return grpc.ssl_server_credentials([pair], root_certificates=roots, require_client_auth=roots is not None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One call, as its behaviour sees it."""

    context: grpc.aio.ServicerContext[Any, Any]
    #: The caller's id by its metadata; empty when it sent none.
    client_id: str
    #: The caller's name by its metadata.
    name: str
    fault: Fault | None


class Combiner:
    """Serves the calls of `scaleout_mp.wire.methods` on the network's loop."""

    def __init__(
        self,
        parts: NetworkParts,
        *,
        faults: FaultPlan,
        accepted_versions: Collection[str] | None,
        tls: ServerTls | None = None,
        release: Release = "1.1",
    ) -> None:
        self._release = release
        self._faults = faults
        self._tls = tls
        #: The port that is listened on, once started.
        self.port = 0
        self._parts = parts
        self._server: grpc.aio.Server | None = None
        self._in_flight: set[asyncio.Task[Any]] = set()
        calls = CombinerCalls(parts, accepted_versions=accepted_versions, release=release)
        models = ModelCalls(parts)
        self._behaviours: dict[Method, Callable[..., Any]] = {
            methods.SEND_MODEL_UPDATE: calls.send_model_update,
            methods.SEND_MODEL_VALIDATION: calls.send_model_validation,
            methods.SEND_MODEL_METRIC: calls.send_model_metric,
            methods.SEND_ATTRIBUTE_MESSAGE: calls.send_attribute_message,
            methods.SEND_TELEMETRY_MESSAGE: calls.send_telemetry_message,
            methods.ANNOUNCE: calls.announce,
            methods.SEND_STATUS: calls.send_status,
            methods.SEND_HEARTBEAT: calls.send_heartbeat,
            methods.POLL_AND_REPORT: calls.poll_and_report,
            methods.TASK_STREAM: calls.task_stream,
            methods.SEND_BACKLOG_REPORT: calls.send_backlog_report,
            methods.STREAM_TELEMETRY_RECORD: calls.stream_telemetry_record,
            methods.STREAM_ATTRIBUTE_RECORD: calls.stream_attribute_record,
            methods.STREAM_INFERENCE_RESULT: calls.stream_inference_result,
            methods.UPLOAD: models.upload,
            methods.DOWNLOAD: models.download,
        }

    async def start(self, *, host: str, port: int) -> None:
        """Listen on `port`; 0: any free one."""
        server = grpc.aio.server(options=_OPTIONS)
        server.add_generic_rpc_handlers(self._handlers())
        address = f"{host}:{port}"
        try:
            if self._tls is None:
                self.port = server.add_insecure_port(address)
            else:
                self.port = server.add_secure_port(address, _credentials(self._tls))
        except RuntimeError as error:
            raise LocalNetworkError(f"cannot serve the combiner on {host}:{port}: {_why_not(host, port)}") from error
        await server.start()
        self._server = server

    async def aclose(self) -> None:
        """Stop to listen and end the calls in flight."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(_STOP_GRACE)
            # It does not wait for those that wait for the client's next part: they would be told of as not handled.
            if left := list(self._in_flight):
                for call in left:
                    call.cancel()
                await asyncio.wait(left, timeout=_STOP_GRACE)
                # And for what waits for them in turn.
                await asyncio.sleep(0)

    @property
    def serving(self) -> bool:
        """Whether the port is open."""
        return self._server is not None

    def _handlers(self) -> tuple[grpc.GenericRpcHandler[Any, Any], ...]:
        services: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = {}
        for method, behaviour in self._behaviours.items():
            if method.since_1_1 and self._release == "1.0":
                # What has no handler is answered UNIMPLEMENTED.
                continue
            services.setdefault(method.service, {})[method.name] = self._handler(method, behaviour)
        return tuple(grpc.method_handlers_generic_handler(name, calls) for name, calls in services.items())

    def _handler(self, method: Method, behaviour: Callable[..., Any]) -> grpc.RpcMethodHandler[Any, Any]:
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[method.stream_in, method.stream_out]
        serialize: Callable[[Any], bytes] = (
            serialize_chunk if method is methods.DOWNLOAD else method.response.SerializeToString
        )
        guarded = self._streaming(method, behaviour) if method.stream_out else self._unary(method, behaviour)
        return make(guarded, request_deserializer=method.request.FromString, response_serializer=serialize)

    def _unary(self, method: Method, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            with self._at_work():
                the_call = await self._admit(method, context)
                try:
                    answer = await behaviour(request, the_call)
                except Exception as error:  # noqa: BLE001 - every error must become an answer
                    await self._fail(method, context, error)
                if the_call.fault is not None and the_call.fault.after and the_call.fault.code is not None:
                    await context.abort(the_call.fault.code, the_call.fault.details)
                return answer

        return call

    def _streaming(self, method: Method, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            with self._at_work():
                the_call = await self._admit(method, context)
                try:
                    async for answer in behaviour(request, the_call):
                        if the_call.fault is not None and the_call.fault.after and the_call.fault.code is not None:
                            await context.abort(the_call.fault.code, the_call.fault.details)
                        yield answer
                except Exception as error:  # noqa: BLE001 - every error must become an answer
                    await self._fail(method, context, error)

        return call

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        task = asyncio.current_task()
        assert task is not None
        self._in_flight.add(task)
        try:
            yield
        finally:
            self._in_flight.discard(task)

    async def _admit(self, method: Method, context: grpc.aio.ServicerContext[Any, Any]) -> Call:
        """Check the caller's token, note its sign of life, and apply a planned fault."""
        metadata = {str(key): value for key, value in context.invocation_metadata() or ()}
        authorization = metadata.get("authorization")
        if not self._parts.tokens.accepts(authorization if isinstance(authorization, str) else None):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the access token is missing, wrong or expired")
        client_id = str(metadata.get("client-id") or metadata.get("client") or "")
        self._parts.registry.seen(client_id)
        fault = self._faults.take(method.name, client_id)
        if fault is not None:
            if fault.delay:
                await asyncio.sleep(fault.delay)
            if fault.code is not None and not fault.after:
                await context.abort(fault.code, fault.details)
            if fault.hang is not None and method not in {methods.UPLOAD, methods.DOWNLOAD}:
                await for_ever()
        return Call(context=context, client_id=client_id, name=str(metadata.get("name") or ""), fault=fault)

    async def _fail(self, method: Method, context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> None:
        if isinstance(error, grpc.aio.AbortError) or self._server is None:
            # An answer already, or nobody is left to give one to: the server is being stopped.
            raise error
        if isinstance(error, ModelNotFoundError):
            code = grpc.StatusCode.NOT_FOUND
        elif isinstance(error, PermissionError):
            code = grpc.StatusCode.PERMISSION_DENIED
        elif isinstance(error, ModelFormatError | ValueError):
            code = grpc.StatusCode.INVALID_ARGUMENT
        else:
            logger.error(
                "call %s failed in the local network", method.name, exc_info=error, extra={"action": "call_failed"}
            )
            code = grpc.StatusCode.INTERNAL
        await context.abort(code, str(error))
