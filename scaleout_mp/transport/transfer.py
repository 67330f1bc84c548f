"""Models to and from the combiner, as streams between the link and sealed memory."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio

from scaleout_mp.errors import CallError, ModelFormatError, ModelNotFoundError, ModelTransferError
from scaleout_mp.model import MemoryWriter, ScaleoutModel
from scaleout_mp.model.memfd import DEFAULT_MAX_SIZE
from scaleout_mp.transport.aside import close_aside, closing_aside
from scaleout_mp.transport.calls import may_pass
from scaleout_mp.transport.channel import END
from scaleout_mp.transport.first_status import FirstStatus
from scaleout_mp.transport.patience import Patience, stalling
from scaleout_mp.transport.progress import Progress
from scaleout_mp.wire import edge_pb2 as pb
from scaleout_mp.wire import methods

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from scaleout_mp.transport.calls import CombinerCalls
    from scaleout_mp.transport.patience import Stall

logger = logging.getLogger(__name__)

#: Tries before bytes that arrive broken, or an upload that the server refuses, count as a failure.
TRIES: Final = 3
#: Bytes of a message.
CHUNK: Final = 1 << 20
#: Bytes that the allocator is to keep for messages, instead of giving them back to the kernel after each.
_KEPT: Final = 8 << 20
#: Bytes that are hashed and written in one go, off the loop.
_BATCH: Final = 4 << 20

Metadata = tuple[tuple[str, str], ...]


class _BrokenTransferError(Exception):
    """The bytes are not what the other side meant."""


class _SharedDownload:
    """A download under way, and how many wait for it."""

    def __init__(self, task: asyncio.Task[ScaleoutModel]) -> None:
        self.task = task
        self.waiting = 0

    async def close(self) -> None:
        """Give up the download or what came of it: everybody has what he asked for, or nobody wants it any more."""
        self.task.cancel()
        await asyncio.wait([self.task])
        if not self.task.cancelled() and self.task.exception() is None:
            close_aside(self.task.result())


class ModelTransfer:
    """Downloads and uploads over one combiner's calls.

    An outage is waited for as long as it lasts; the task that needs the model can be aborted meanwhile.
    """

    def __init__(
        self,
        calls: CombinerCalls,
        *,
        max_size: int = DEFAULT_MAX_SIZE,
        check: Callable[[ScaleoutModel, str], Awaitable[None]] | None = None,
        patience: Patience | None = None,
    ) -> None:
        """Accept models of up to `max_size` bytes, for which `check(model, model_id)` raises nothing."""
        self._calls = calls
        self._patience = patience or Patience()
        self._max_size = max_size
        self._check = check
        self._shared: dict[str, _SharedDownload] = {}
        self._under_way: dict[str, Progress] = {}

    def progress(self, model_id: str) -> Progress | None:
        """Return how far a model has come that is on its way up or down. From any thread."""
        return self._under_way.get(model_id)

    @contextlib.contextmanager
    def _followed(self, verb: str, model_id: str, total: int | None = None) -> Iterator[Progress]:
        progress = self._under_way[model_id] = Progress(verb, model_id, total)
        try:
            yield progress
            progress.finish()
        finally:
            if self._under_way.get(model_id) is progress:
                del self._under_way[model_id]

    async def download(self, model_id: str) -> ScaleoutModel:
        """Return the model, whole and in sealed memory; who asks for it at the same time shares download and memory.

        Raises ModelNotFoundError, ModelTransferError when it arrives broken `TRIES` times, ModelFormatError when it is
        too large, or whole but no model, CallError when the combiner refuses, and what `check` raises.
        """
        shared = self._shared.get(model_id)
        if shared is None or shared.task.done():
            shared = self._shared[model_id] = _SharedDownload(asyncio.create_task(self._download(model_id)))
        shared.waiting += 1
        try:
            # Shielded: who gives up must not take it from the others.
            model = await asyncio.shield(shared.task)
            return ScaleoutModel.from_fd(model.fileno(), verify=False)
        finally:
            shared.waiting -= 1
            if not shared.waiting:
                if self._shared.get(model_id) is shared:
                    del self._shared[model_id]
                await shared.close()

    async def _download(self, model_id: str) -> ScaleoutModel:
        _keep_pages()
        with self._followed("downloaded", model_id) as progress:
            model = await self._download_whole(model_id, progress)
        if self._check is not None:
            try:
                await self._check(model, model_id)
            except BaseException:
                close_aside(model)
                raise
        return model

    async def _download_whole(self, model_id: str, progress: Progress) -> ScaleoutModel:
        failed: Exception | None = None
        for attempt in range(1, TRIES + 1):
            try:
                return await self._calls.retried(
                    methods.DOWNLOAD.name, lambda: self._download_once(model_id, progress), attempts=None
                )
            except (_BrokenTransferError, CallError) as error:
                if isinstance(error, CallError) and not may_pass(error):
                    if error.code == grpc.StatusCode.NOT_FOUND.name:
                        raise ModelNotFoundError(f"the server does not have model {model_id}") from error
                    raise
                failed = error
                logger.warning(
                    "model %s arrived broken (try %d of %d): %s",
                    model_id,
                    attempt,
                    TRIES,
                    error,
                    extra={"action": "download_broken", "model_id": model_id},
                )
            if isinstance(failed, CallError) and attempt < TRIES:
                await self._calls.sleep(self._calls.delay(attempt))
        raise ModelTransferError(f"model {model_id} arrived broken {TRIES} times: {failed}") from failed

    async def _download_once(self, model_id: str, progress: Progress) -> ScaleoutModel:
        call = self._calls.multicallable(methods.DOWNLOAD)

        async def attempt(metadata: Metadata) -> tuple[MemoryWriter, str | None]:
            # Each attempt begins with empty memory: what a broken one left is no part of the model.
            writer = MemoryWriter(max_size=self._max_size)
            stream = call(pb.ModelRequest(model_id=model_id), metadata=metadata)
            progress.again()
            try:
                await _receive(stream, writer, progress, self._patience)
                return writer, _checksum(await stream.trailing_metadata())
            except BaseException:
                close_aside(writer)
                raise
            finally:
                stream.cancel()

        writer, expected = await self._calls.authorized(methods.DOWNLOAD, attempt)
        self._calls.link.succeeded()
        # Closes what was not sealed.
        async with closing_aside(writer):
            _check_whole(writer, expected)
            try:
                return await asyncio.to_thread(_model_of, writer, model_id, verify=expected is None)
            except ModelFormatError as error:
                if expected is not None:
                    raise
                raise _BrokenTransferError(str(error)) from error

    async def upload(self, model: ScaleoutModel) -> None:
        """Send the model under its own id.

        Raises ModelTransferError when the server answers FAILED `TRIES` times, CallError when it refuses the
        call.
        """
        model_id = model.model_id
        if model_id is None:
            raise ModelTransferError("a model without an id cannot be uploaded")
        checksum = await asyncio.to_thread(lambda: model.checksum)
        _keep_pages()
        with self._followed("uploaded", model_id, model.size) as progress:
            await self._upload(model, model_id, checksum, progress)

    async def _upload(self, model: ScaleoutModel, model_id: str, checksum: str, progress: Progress) -> None:
        said = ""
        for attempt in range(1, TRIES + 1):
            try:
                answer = await self._calls.retried(
                    methods.UPLOAD.name, lambda: self._upload_once(model, model_id, checksum, progress), attempts=None
                )
            except (_BrokenTransferError, CallError) as error:
                if isinstance(error, CallError) and not may_pass(error):
                    raise
                said = str(error)
            else:
                if answer.status == pb.ModelStatus.OK:
                    return
                said = answer.message or pb.ModelStatus.Name(answer.status)
            logger.warning(
                "the server did not take model %s (try %d of %d): %s",
                model_id,
                attempt,
                TRIES,
                said,
                extra={"action": "upload_refused", "model_id": model_id},
            )
            if attempt < TRIES:
                await self._calls.sleep(self._calls.delay(attempt))
        raise ModelTransferError(f"the server did not take model {model_id}, {TRIES} times: {said}")

    async def _upload_once(
        self, model: ScaleoutModel, model_id: str, checksum: str, progress: Progress
    ) -> pb.ModelResponse:
        call = self._calls.multicallable(methods.UPLOAD, serializer=serialize_chunk)

        async def attempt(metadata: Metadata) -> Any:
            with_id = (*metadata, ("model-id", model_id), ("checksum", checksum))
            progress.again()
            patience = self._patience
            async with stalling(methods.UPLOAD.name, patience.upload, "the server takes nothing") as stall:
                under_way = call(_chunks(model, progress, stall, patience), metadata=with_id)
                return await _answer(under_way)

        answer: pb.ModelResponse = await self._calls.authorized(methods.UPLOAD, attempt)
        self._calls.link.succeeded()
        return answer


@functools.cache
def _keep_pages() -> None:
    """Have glibc serve messages from pages that it has, for the rest of this process's life.

    It takes a block above a threshold from the kernel each time, and gives it back: clearing its pages costs several
    times what sending them does. The threshold grows to the size of the largest such block that was freed, and how much
    may lie idle to twice that: mallopt(3), M_MMAP_THRESHOLD.
    """
    block = bytes(_KEPT)
    del block


async def _receive(stream: Any, writer: MemoryWriter, progress: Progress, patience: Patience) -> None:
    """Write a stream's bytes to memory; hashing and copying happen off the loop, in batches."""
    batch: list[bytes] = []
    size = 0
    while True:
        async with stalling(methods.DOWNLOAD.name, patience.download, "no byte came"):
            message = await stream.read()
        if message is None:
            raise _BrokenTransferError("a part of it cannot be read")
        done = message is END
        if not done:
            batch.append(message.data)
            size += len(message.data)
            progress.add(len(message.data))
        if batch and (done or size >= _BATCH):
            await asyncio.to_thread(_write_all, writer, batch)
            batch, size = [], 0
        if done:
            return


def _check_whole(writer: MemoryWriter, expected: str | None) -> None:
    if writer.size == 0:
        raise _BrokenTransferError("no bytes came")
    if expected is not None and expected != writer.hexdigest():
        raise _BrokenTransferError(f"its SHA-256 is {writer.hexdigest()}, the server says {expected}")


def _write_all(writer: MemoryWriter, batch: list[bytes]) -> None:
    for data in batch:
        writer.write(data)


def _model_of(writer: MemoryWriter, model_id: str, *, verify: bool) -> ScaleoutModel:
    """Return the model in the memory; `verify` reads it whole, for bytes that came without a checksum."""
    model = ScaleoutModel.from_memory(writer.seal())
    if verify:
        model.verify()
    if not model.legacy_source:
        return model
    # Bare weights have no id of their own: they get the one under which they were asked for.
    with model:
        return model.to_builder().set_model_id(model_id).build()


def _checksum(trailing: Any) -> str | None:
    for key, value in trailing or ():
        if key == "checksum" and value:
            return value.lower() if isinstance(value, str) else value.decode("ascii", "replace").lower()
    return None


async def _chunks(
    model: ScaleoutModel, progress: Progress, stall: Stall, patience: Patience
) -> AsyncIterator[memoryview]:
    for view in model.iter_chunks(CHUNK):
        yield view
        progress.add(len(view))
        stall.moved(patience.upload, "the server takes nothing more")
    stall.moved(patience.for_answer(model.size), "the server has all of the model and does not answer")


async def _answer(upload: Any) -> Any:
    status = FirstStatus(upload)
    try:
        answer = await upload
    except grpc.aio.AioRpcError as error:
        meant = status.instead_of(error)
        if meant.code() is grpc.StatusCode.OK:
            raise _BrokenTransferError("it answered before it had all of the model") from error
        raise meant from error
    if answer is None:
        # What gRPC makes of one that it cannot read.
        raise _BrokenTransferError("its answer cannot be read")
    return answer


def serialize_chunk(data: memoryview | bytes) -> bytes:
    """Return the wire form of `FileChunk(data=...)` with one copy of the bytes instead of two.

    Field 1, length-delimited: tag 0x0a, the length as a varint, the payload.
    """
    length = len(data)
    prefix = bytearray(b"\x0a")
    while length > 0x7F:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    prefix.append(length)
    return b"".join((prefix, data))
