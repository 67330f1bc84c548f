"""The models of a local network as files, `<model id>.scm`, moved on and off the wire in pieces."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, Self

from scaleout_mp.errors import LocalNetworkError, ModelFormatError, ModelNotFoundError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

#: Bytes of a model in one message; 1 MiB moves fastest.
CHUNK_SIZE: Final = 1 << 20

_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


class Savable(Protocol):
    """What can be put: a ScaleoutModel."""

    @property
    def model_id(self) -> str | None:
        """The id under which it is kept."""
        ...

    def save_to_file(self, file_path: str) -> None:
        """Write the container."""
        ...


class ModelFiles:
    """A folder of models. Not for several processes at once."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._checksums: dict[str, str] = {}
        #: Who uploaded a model: the client's id; absent for models that the network made.
        self._uploaders: dict[str, str] = {}

    def path(self, model_id: str) -> Path:
        """Return where a model lies or would lie; ModelFormatError when the id is not a plain name."""
        if not _PLAIN_NAME.fullmatch(model_id):
            raise ModelFormatError(f"{model_id!r} is not a plain model id")
        return self._folder / f"{model_id}.scm"

    def has(self, model_id: str) -> bool:
        """Whether the model is there."""
        return bool(_PLAIN_NAME.fullmatch(model_id)) and self.path(model_id).is_file()

    def put(self, model: Savable) -> str:
        """Keep a model that the network made; returns its id. Blocks on the disk."""
        if not model.model_id:
            raise LocalNetworkError("the model has no model_id; build it with ScaleoutModel.from_training_model")
        path = self.path(model.model_id)
        beside = path.with_suffix(".part")
        model.save_to_file(os.fspath(beside))
        beside.replace(path)
        self._checksums.pop(model.model_id, None)
        self._uploaders.pop(model.model_id, None)
        return model.model_id

    def remove(self, model_id: str) -> None:
        """Forget a model, if it is there."""
        self.path(model_id).unlink(missing_ok=True)
        self._checksums.pop(model_id, None)
        self._uploaders.pop(model_id, None)

    def receive(self, model_id: str, client_id: str) -> ModelReceiver:
        """Start to receive an upload; ModelFormatError when the client may not use that id."""
        path = self.path(model_id)
        if path.is_file() and self._uploaders.get(model_id) != client_id:
            raise ModelFormatError(f"model {model_id} exists already")
        return ModelReceiver(self, model_id, client_id)

    def keep_upload(self, receiver: ModelReceiver, part: str) -> None:
        """Give a finished upload its name. Called by the receiver."""
        os.replace(part, self.path(receiver.model_id))
        self._checksums[receiver.model_id] = receiver.hexdigest()
        self._uploaders[receiver.model_id] = receiver.client_id

    @property
    def folder(self) -> Path:
        """Where the models lie."""
        return self._folder

    async def checksum(self, model_id: str) -> str:
        """Return the hex SHA-256 of a model's file; computed once, on a thread."""
        known = self._checksums.get(model_id)
        if known is None:
            known = await asyncio.to_thread(_hash_file, self._require(model_id))
            self._checksums[model_id] = known
        return known

    async def chunks(self, model_id: str) -> AsyncIterator[bytes]:
        """Yield the bytes of a model in pieces of CHUNK_SIZE."""
        # Read, not mapped: the pieces go to gRPC as bytes, so a map would save no copy and could fault on the loop.
        with self._require(model_id).open("rb", buffering=0) as file:
            while data := await asyncio.to_thread(file.read, CHUNK_SIZE):
                yield data

    def size(self, model_id: str) -> int:
        """Return the size of a model's file in bytes."""
        return self._require(model_id).stat().st_size

    def _require(self, model_id: str) -> Path:
        path = self.path(model_id)
        if not path.is_file():
            raise ModelNotFoundError(f"there is no model {model_id}")
        return path


class ModelReceiver:
    """An upload in progress: written beside its final name and hashed on the way."""

    def __init__(self, files: ModelFiles, model_id: str, client_id: str) -> None:
        self.model_id = model_id
        self.client_id = client_id
        #: Bytes received so far.
        self.size = 0
        self._files = files
        self._digest = hashlib.sha256()
        self._pending: list[bytes] = []
        self._pending_size = 0
        # Two uploads of one id may overlap when a client retries, so each has a name of its own.
        self._fd, self._part = tempfile.mkstemp(dir=files.folder, prefix=f"{model_id}.", suffix=".part")

    async def write(self, data: bytes) -> None:
        """Take the next bytes. Small ones are gathered: a thread per 32 KiB would cost more than the writing."""
        self._pending.append(data)
        self._pending_size += len(data)
        self.size += len(data)
        if self._pending_size >= CHUNK_SIZE:
            await self._flush()

    async def finish(self, checksum: str | None) -> None:
        """Keep the model; ModelFormatError when its bytes do not have this hex SHA-256."""
        await self._flush()
        if self.size == 0:
            raise ModelFormatError("the upload was empty")
        if checksum and checksum.lower() != self.hexdigest():
            raise ModelFormatError(f"checksum mismatch: announced {checksum}, received {self.hexdigest()}")
        self._files.keep_upload(self, self._part)

    def hexdigest(self) -> str:
        """Return the SHA-256 of what was written."""
        return self._digest.hexdigest()

    async def _flush(self) -> None:
        data, self._pending, self._pending_size = b"".join(self._pending), [], 0
        if data:
            await asyncio.to_thread(self._write_out, data)

    def _write_out(self, data: bytes) -> None:
        self._digest.update(data)
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def close(self) -> None:
        """Drop what was not kept."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            Path(self._part).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
