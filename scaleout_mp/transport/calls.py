"""Calls to the combiner: metadata, token refresh, retries, and errors without gRPC in them."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import grpc
import grpc.aio

from scaleout_mp.errors import AuthenticationError, CallError, TransportError
from scaleout_mp.transport.backoff import Backoff
from scaleout_mp.transport.channel import END
from scaleout_mp.transport.http import one_line, without
from scaleout_mp.transport.link import LinkWatch
from scaleout_mp.wire import edge_pb2 as pb
from scaleout_mp.wire import methods
from scaleout_mp.wire.directives import Directive, read_directive, read_task

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from scaleout_mp.transport.channel import CallCredentials
    from scaleout_mp.wire.methods import Method

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds after which a unary call counts as lost.
CALL_TIMEOUT = 10.0

_TRANSIENT = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        # The server's doing: a call that this side gives up raises asyncio.CancelledError instead.
        grpc.StatusCode.CANCELLED,
        # Combiners say this while they are not ready yet.
        grpc.StatusCode.FAILED_PRECONDITION,
    }
)
#: What proxies and dying servers leave behind, under codes that otherwise mean a bug.
_BROKEN_STREAM = ("stream removed", "rst_stream", "goaway", "connection reset", "socket closed")

#: How gRPC says that a web server answered, and not the combiner behind it; and what it makes of a 404, and of a 400 or
#: 500, as they come while the combiner is restarted.
_NOT_THE_COMBINER = "http2 header with status"
_OF_WEB_SERVERS = frozenset({grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN})

#: Behind these may be a bug of the server's, or something that passes: worth a few tries, and no more.
_DOUBTFUL = frozenset({"ABORTED", "DATA_LOSS", "INTERNAL", "UNKNOWN"})

#: How servers in several languages say that a message will never pass; trying again would block what waits behind it.
_TOO_LARGE = ("larger than max", "exceeds maximum size")


#: Seconds between two looks at the channel's state.
_CHANNEL_LOOK: Final = 1.0

#: How answers are read of which a part may be no good.
_READERS: Final[dict[str, Callable[[bytes], Any]]] = {
    methods.POLL_AND_REPORT.name: read_directive,
    methods.TASK_STREAM.name: read_task,
}


def is_transient(code: grpc.StatusCode, details: str) -> bool:
    """Whether the same call may succeed later."""
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and any(sign in details.lower() for sign in _TOO_LARGE):
        return False
    if code in _TRANSIENT:
        return True
    if code in _OF_WEB_SERVERS and _NOT_THE_COMBINER in details.lower():
        return True
    broken = code in {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL}
    return broken and any(sign in details.lower() for sign in _BROKEN_STREAM)


def may_pass(error: TransportError) -> bool:
    """Whether a call failed in a way that a few more tries may help."""
    return isinstance(error, CallError) and not error.transient and error.code in _DOUBTFUL


def _call_error(method: Method, error: grpc.aio.AioRpcError, token: str | None = None) -> CallError:
    details = one_line(without((token,) if token else (), error.details() or ""))
    code = error.code()
    if code is grpc.StatusCode.UNIMPLEMENTED and is_transient(code, details):
        # It would say of the combiner that it lacks the call.
        code = grpc.StatusCode.UNAVAILABLE
    return CallError(
        f"{method.name}: {code.name} {details}".rstrip(),
        call=method.name,
        code=code.name,
        transient=is_transient(code, details),
    )


class CombinerCalls:
    """The combiner's calls over one channel. Lives on one event loop."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        credentials: CallCredentials,
        *,
        backoff: Backoff | None = None,
        link: LinkWatch | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        rand: Callable[[], float] = random.random,
    ) -> None:
        self.backoff = backoff or Backoff(first=0.5)
        self.link = link or LinkWatch(asyncio.get_running_loop().time)
        self.sleep = sleep
        self.credentials = credentials
        self._channel = channel
        self._rand = rand
        self._callables: dict[str, Any] = {}
        #: Calls that the server does not have, and after how many outages it said so: another one may come back.
        self._lacking: dict[str, int] = {}
        #: The call whose round trips say how good the link is.
        self.probe: Method = methods.POLL_AND_REPORT

    def delay(self, failures: int) -> float:
        """Return the seconds to wait after that many failures in a row."""
        return self.backoff.delay(failures, self._rand)

    async def authorized(
        self,
        method: Method,
        attempt: Callable[[tuple[tuple[str, str], ...]], Awaitable[T]],
    ) -> T:
        """Await `attempt(metadata)` once; when the token is refused, refresh it and await a second time.

        Raises CallError, AuthenticationError when the combiner will not have this client, and TransportError
        when no token can be had.
        """
        metadata = await self.credentials.metadata()
        try:
            return await attempt(metadata)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                raise self.error_of(method, error, metadata) from error
        await self.renew_token(method, metadata)
        metadata = await self.credentials.metadata()
        try:
            return await attempt(metadata)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise AuthenticationError(
                    f"{method.name}: the combiner refused a fresh token; ask the network's owner for another"
                ) from error
            raise self.error_of(method, error, metadata) from error

    async def renew_token(self, method: Method, metadata: tuple[tuple[str, str], ...]) -> None:
        """Replace the token with which a call was refused.

        Raises AuthenticationError when there is no other to be had, TransportError when the API does not answer.
        """
        if not self.credentials.can_refresh:
            held = "refused the token" if self.credentials.held else "wants a token, and none was given"
            raise AuthenticationError(f"{method.name}: the combiner {held}")
        await self.credentials.refresh(rejected=self.credentials.token_of(metadata))

    def error_of(
        self, method: Method, error: grpc.aio.AioRpcError, metadata: tuple[tuple[str, str], ...] = ()
    ) -> CallError:
        """Return what went wrong with a call, without the token that it carried."""
        return _call_error(method, error, self.credentials.token_of(metadata))

    def speaks(self, method: Method) -> bool:
        """Whether the server may have a call; False once it said that it has not, for as long as it is there."""
        return self._lacking.get(method.name) != self.link.outages

    def lacks(self, method: Method) -> None:
        """Note that the server does not have a call."""
        if self.speaks(method):
            logger.info("the server has no %s: it speaks release 1.0", method.name, extra={"action": "call_lacking"})
        self._lacking[method.name] = self.link.outages

    async def once(self, method: Method, request: Any, *, within: float = CALL_TIMEOUT) -> Any:
        """Make one unary call, within so many seconds and without retries; raises like `authorized`."""
        call = self.multicallable(method)

        async def attempt(metadata: tuple[tuple[str, str], ...]) -> Any:
            begun = asyncio.get_running_loop().time()
            answer = await call(request, metadata=metadata, timeout=within)
            if method is self.probe:
                self.link.quality.measured(asyncio.get_running_loop().time() - begun)
            return answer

        answer = await self.authorized(method, attempt)
        if answer is None:
            # What gRPC makes of an answer that it cannot read, after a line in its own log.
            raise CallError(f"{method.name}: the answer cannot be read", call=method.name, code="INTERNAL")
        self.link.succeeded()
        return answer

    async def call(self, method: Method, request: Any, *, attempts: int | None, within: float = CALL_TIMEOUT) -> Any:
        """Make one unary call; transient failures are retried, at most `attempts` tries, None: for ever.

        Raises the last error.
        """
        return await self.retried(method.name, lambda: self.once(method, request, within=within), attempts=attempts)

    async def retried(self, what: str, attempt: Callable[[], Awaitable[T]], *, attempts: int | None) -> T:
        """Await `attempt()` until it succeeds, fails for good or failed `attempts` times."""
        failures = 0
        while True:
            try:
                return await attempt()
            except TransportError as error:
                failures += 1
                if not worth_retrying(error) or failures == attempts:
                    raise
                wait = self.delay(failures)
                self.link.failed(what, error, wait)
                await self.sleep(wait)

    async def stream(self, method: Method, request: Any) -> AsyncIterator[Any]:
        """Yield what a server stream sends, until it ends or breaks. Raises like `once`."""
        call = self.multicallable(method)

        async def attempt(metadata: tuple[tuple[str, str], ...]) -> Any:
            stream = call(request, metadata=metadata)
            # A refusal comes before the first message; only then can a second attempt be made.
            return stream, await stream.read()

        stream, message = await self.authorized(method, attempt)
        try:
            while message is not END:
                self.link.succeeded()
                yield message
                message = await stream.read()
        except grpc.aio.AioRpcError as error:
            raise _call_error(method, error) from error
        finally:
            stream.cancel()

    async def poll(self, report: pb.ClientReport, *, within: float) -> Directive:
        """Report activities and get directives; one attempt."""
        directive = cast("Directive", await self.once(methods.POLL_AND_REPORT, report, within=within))
        if directive.problem:
            raise TransportError(directive.problem)
        return directive

    async def announce(
        self,
        kind: str,
        *,
        client_id: str,
        parameters: Mapping[str, Any] | None = None,
        attempts: int | None,
        within: float = CALL_TIMEOUT,
    ) -> pb.Response:
        """Announce `Connect`, `Disconnect` or `VersionCheck`."""
        request = pb.ClientAnnounceRequest(
            client_id=client_id, type=kind, parameters=json.dumps(dict(parameters)) if parameters else ""
        )
        answer = await self.call(methods.ANNOUNCE, request, attempts=attempts, within=within)
        return cast("pb.Response", answer)

    def multicallable(self, method: Method, *, serializer: Callable[[Any], bytes] | None = None) -> Any:
        """Return the channel's callable for a method; made once."""
        known = self._callables.get(method.name)
        if known is None:
            make = {
                (False, False): self._channel.unary_unary,
                (False, True): self._channel.unary_stream,
                (True, False): self._channel.stream_unary,
                (True, True): self._channel.stream_stream,
            }[method.stream_in, method.stream_out]
            known = self._callables[method.name] = make(
                method.path,
                request_serializer=serializer or _wire_form,
                response_deserializer=_READERS.get(method.name, method.response.FromString),
            )
        return known

    def single_record(self, method: Method) -> Any:
        """Return a callable that sends one message as all of a method's stream of requests."""
        key = f"{method.name} of one"
        known = self._callables.get(key)
        if known is None:
            known = self._callables[key] = self._channel.unary_stream(
                method.path, request_serializer=_wire_form, response_deserializer=method.response.FromString
            )
        return known

    async def watch_channel(self) -> None:
        """Have the link's quality know of the channel's state, until cancelled.

        gRPC does not give up a wait for a change of state: its end still comes when the loop is closed, and is an error
        in whichever other loop of the process reads gRPC's events. So the state is looked at instead.
        """
        while (state := self._channel.get_state()) is not grpc.ChannelConnectivity.SHUTDOWN:
            self.link.quality.channel(failing=state is grpc.ChannelConnectivity.TRANSIENT_FAILURE)
            await asyncio.sleep(_CHANNEL_LOOK)

    async def aclose(self) -> None:
        """Close the channel; calls under way are cancelled."""
        await self._channel.close(None)
        await self.credentials.aclose()


def _wire_form(message: Any) -> bytes:
    """Return a message as it is sent; what waited for its turn is in that form already."""
    return message if isinstance(message, bytes) else cast("bytes", message.SerializeToString())


def worth_retrying(error: TransportError) -> bool:
    """Whether the same call may succeed later. An API that cannot give a token now may give one later."""
    if isinstance(error, CallError):
        return error.transient
    return not isinstance(error, AuthenticationError)
