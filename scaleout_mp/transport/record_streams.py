"""Streamed records: one stream of each kind per connection, each record acknowledged by its id.

A stream that breaks fails all records that are not acknowledged; who wants them delivered gives them again, with the
same ids. Why it broke cannot be told: gRPC hides the server's status while something is being written. So the first
record of a stream, and each one that was under way when one broke, goes by itself, as a stream of one record, whose
status is that record's own. A server that does not have the call, or refuses a record, is known by that.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio

from scaleout_mp.errors import CallError
from scaleout_mp.transport.channel import END

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scaleout_mp.transport.calls import CombinerCalls
    from scaleout_mp.wire.methods import Method

#: Seconds after which a record that is not acknowledged counts as lost, and its stream as dead.
ACK_TIMEOUT: Final = 30.0


class RecordStreams:
    """The streams of one connection, each opened when its first record has arrived. Lives on one event loop."""

    def __init__(self, calls: CombinerCalls, *, ack_timeout: float = ACK_TIMEOUT) -> None:
        self._calls = calls
        self._ack_timeout = ack_timeout
        self._streams: dict[str, _Stream] = {}

    async def deliver(self, method: Method, records: Mapping[str, bytes]) -> None:
        """Send records, by id, and wait until all are acknowledged. Raises like `CombinerCalls.once`."""
        stream = self._streams.get(method.name)
        if stream is None:
            stream = self._streams[method.name] = _Stream(self._calls, method, self._ack_timeout)
        await stream.deliver(records)

    async def aclose(self) -> None:
        """End all streams."""
        for stream in self._streams.values():
            await stream.aclose()


class _Stream:
    """One kind of record: the stream that is open, or the next one."""

    def __init__(self, calls: CombinerCalls, method: Method, ack_timeout: float) -> None:
        self._calls = calls
        self._method = method
        self._ack_timeout = ack_timeout
        # Held while something is sent: records go out in order.
        self._gate = asyncio.Lock()
        self._life: _Life | None = None
        #: Records that were under way when a stream broke: one of them may be why.
        self._suspects: set[str] = set()
        #: Whether streams of several records get anywhere: a proxy that waits for their end lets nothing through.
        self._flows = True

    async def deliver(self, records: Mapping[str, bytes]) -> None:
        waiting: list[asyncio.Future[None]] = []
        try:
            async with asyncio.timeout(self._ack_timeout):
                async with self._gate:
                    for record_id, packed in records.items():
                        await self._send(record_id, packed, waiting)
                if waiting:
                    await asyncio.wait(waiting)
        except TimeoutError:
            lost = self._lost(f"no acknowledgement came for {self._ack_timeout:.0f} s")
            life = self._life
            if waiting and life is not None:
                self._flows = self._flows and life.proven
                self._suspects.update(records)
                life.end(lost)
            raise lost from None
        for future in waiting:
            future.result()

    async def _send(self, record_id: str, packed: bytes, waiting: list[asyncio.Future[None]]) -> None:
        life = self._life
        if life is not None and not life.over and record_id not in self._suspects:
            waiting.append(await life.send(record_id, packed))
            return
        await self._alone(record_id, packed)
        self._suspects.discard(record_id)
        if self._flows and (self._life is None or self._life.over):
            metadata = await self._calls.credentials.metadata()
            self._life = _Life(self._calls.multicallable(self._method)(metadata=metadata), self)

    async def _alone(self, record_id: str, packed: bytes) -> None:
        """Send a record as the only one of a stream."""
        call = self._calls.single_record(self._method)

        async def attempt(metadata: tuple[tuple[str, str], ...]) -> None:
            stream = call(packed, metadata=metadata, timeout=self._ack_timeout)
            try:
                while (ack := await stream.read()) is not END:
                    if ack is not None and record_id in ack.record_ids:
                        return
            finally:
                stream.cancel()
            raise self._lost("the server ended the stream without an acknowledgement")

        await self._calls.authorized(self._method, attempt)
        self._calls.link.succeeded()

    def acknowledged(self) -> None:
        """Note a sign of life of the server."""
        self._calls.link.succeeded()

    def broken(self, why: str, under_way: Mapping[str, asyncio.Future[None]]) -> CallError:
        """Note that the stream ended with records under way; return what to tell those who wait."""
        self._suspects.update(under_way)
        return self._lost(why)

    def _lost(self, why: str) -> CallError:
        return CallError(f"{self._method.name}: {why}", call=self._method.name, code="CANCELLED", transient=True)

    async def aclose(self) -> None:
        if self._life is not None:
            await self._life.aclose()


class _Life:
    """One stream from its opening to its end."""

    def __init__(self, call: Any, stream: _Stream) -> None:
        self._call = call
        self._stream = stream
        self._waiting: dict[str, asyncio.Future[None]] = {}
        #: Something was acknowledged on it.
        self.proven = False
        self.over = False
        self._reader = asyncio.create_task(self._read(), name="acknowledgements")

    async def send(self, record_id: str, packed: bytes) -> asyncio.Future[None]:
        """Return what is done once the record is acknowledged, or will not be on this stream."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Whoever waits gets the error; when nobody does any more, it is not news.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._waiting[record_id] = future
        # A stream that has ended says so to the reader.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self._call.write(packed)
        return future

    async def _read(self) -> None:
        why = "the server ended the stream"
        try:
            while (ack := await self._call.read()) is not END:
                self._stream.acknowledged()
                self.proven = True
                for record_id in ack.record_ids:
                    future = self._waiting.pop(record_id, None)
                    if future is not None and not future.done():
                        future.set_result(None)
        except grpc.aio.AioRpcError as broken:
            why = f"the stream broke: {broken.code().name}"
        except asyncio.CancelledError:
            # Of the call or of this task: either way the stream was given up on this side.
            why = "the stream was given up"
        except Exception as bug:  # noqa: BLE001 - whatever is wrong with an answer, nobody may wait for ever
            why = f"an answer cannot be read: {type(bug).__name__}: {bug}"
        self.end(self._stream.broken(why, self._waiting))

    def end(self, error: CallError) -> None:
        """Fail what is not acknowledged, and send no more."""
        self.over = True
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(error)
        self._call.cancel()

    async def aclose(self) -> None:
        """Give the stream up."""
        self._reader.cancel()
        await asyncio.wait([self._reader])
