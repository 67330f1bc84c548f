"""The model that callbacks get and return."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, Self

from scaleout_mp.display import html_table, readable_size
from scaleout_mp.errors import ModelFormatError
from scaleout_mp.model import container as layout
from scaleout_mp.model.container import DEFAULT_LIMITS, Container, ContainerLimits
from scaleout_mp.model.files import replace_and_open
from scaleout_mp.model.helpers import Helper, get_helper, require_helper
from scaleout_mp.model.memfd import MappedBytes, SealedMemory, is_sealed
from scaleout_mp.model.streams import ViewStream

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

    from scaleout_mp.model.builder import ScaleoutModelBuilder
    from scaleout_mp.model.deflate import Compression
    from scaleout_mp.wire.edge_pb2 import FileChunk

#: Bytes of one message of a model stream.
CHUNK_SIZE = 1 << 20
#: Entries of metadata, and files, that a notebook shows.
_SHOWN = 20


class ScaleoutModel:
    """Weights, metadata and, optionally, an inference model and files, in one immutable container.

    The container lies in sealed memory or in a mapped file and is never copied to be read: weights that are
    stored uncompressed come back as read-only arrays over it. To change something, go through `to_builder`.
    `close` gives the descriptor back; arrays that were taken stay valid.
    """

    _container: Container
    _helper: Helper | None
    _legacy_checksum: str | None

    def __init__(self) -> None:
        raise TypeError(
            "ScaleoutModel is made by from_training_model, from_file, from_stream or from_filechunk_stream, "
            "or by a ScaleoutModelBuilder"
        )

    @classmethod
    def _create(cls, container: Container, *, helper: Helper | None = None, legacy_checksum: str | None = None) -> Self:
        model = object.__new__(cls)
        model._container = container
        model._helper = helper
        model._legacy_checksum = legacy_checksum
        return model

    # The factories

    @staticmethod
    def from_training_model(
        model_params: Any,
        helper: Helper | None = None,
        metadata: Mapping[str, Any] | None = None,
        *,
        compression: Compression = "auto",
        checksum: bool = False,
    ) -> ScaleoutModel:
        """Build a model from weights, with a fresh model id; numpyhelper unless another helper is given.

        `compression` and `checksum`: see `ScaleoutModelBuilder.build`.
        """
        from scaleout_mp.model.builder import ScaleoutModelBuilder

        builder = ScaleoutModelBuilder.from_training_model(model_params, helper)
        return builder.set_metadata_dict(metadata or {}).build(compression=compression, checksum=checksum)

    @staticmethod
    def from_file(file_path: str | os.PathLike[str], *, limits: ContainerLimits = DEFAULT_LIMITS) -> ScaleoutModel:
        """Open a container where it lies, or wrap bare weights in a new one. The file stays as it is."""
        from scaleout_mp.model.builder import ScaleoutModelBuilder

        return ScaleoutModelBuilder.from_file(file_path, limits=limits).build()

    @staticmethod
    def from_stream(stream: BinaryIO, *, limits: ContainerLimits = DEFAULT_LIMITS) -> ScaleoutModel:
        """Read a model, from the stream's position to its end, into memory."""
        from scaleout_mp.model.builder import ScaleoutModelBuilder

        return ScaleoutModelBuilder.from_stream(stream, limits=limits).build()

    @staticmethod
    def from_filechunk_stream(
        filechunk_stream: Iterable[FileChunk], *, limits: ContainerLimits = DEFAULT_LIMITS
    ) -> ScaleoutModel:
        """Read a model from gRPC messages into memory."""
        from scaleout_mp.model.builder import ScaleoutModelBuilder

        return ScaleoutModelBuilder.from_filechunk_stream(filechunk_stream, limits=limits).build()

    @staticmethod
    def from_memory(memory: MappedBytes, *, limits: ContainerLimits = DEFAULT_LIMITS) -> ScaleoutModel:
        """Take ownership of sealed memory, a download for example, or of a mapped file; bare weights are wrapped."""
        from scaleout_mp.model.builder import ScaleoutModelBuilder

        return ScaleoutModelBuilder.from_memory(memory, limits=limits).build()

    @classmethod
    def from_fd(cls, fd: int, *, verify: bool = True, limits: ContainerLimits = DEFAULT_LIMITS) -> Self:
        """Adopt a duplicate of a descriptor that another process sent.

        `verify` (for what comes from a child): it must be sealed memory, and the bytes of every entry are
        compared with their CRC-32. Without it (for what comes from the supervisor) a file is as good, and
        contents are not read.
        """
        source = SealedMemory.from_fd(fd) if verify or is_sealed(fd) else MappedBytes.from_fd(fd)
        try:
            container = Container(source, trusted=not verify, limits=limits)
            if verify:
                container.verify()
        except BaseException:
            source.close()
            raise
        return cls._create(container)

    @staticmethod
    def detect_format(stream: BinaryIO) -> str:
        """Say whether a stream holds a container ("zip") or bare weights ("legacy"); the position is kept."""
        position = stream.tell()
        try:
            return _detect(memoryview(stream.read()))
        finally:
            stream.seek(position)

    @staticmethod
    def detect_format_file(file_path: str | os.PathLike[str]) -> str:
        """Say whether a file is a container ("zip") or bare weights ("legacy")."""
        with MappedBytes.open(file_path) as source:
            return _detect(source.view())

    # What it says about itself

    @property
    def metadata(self) -> dict[str, Any]:
        """A copy of the metadata."""
        return copy.deepcopy(self._container.metadata)

    @property
    def model_id(self) -> str | None:
        """The model's id; None only for a container of another maker that lacks one."""
        model_id: str | None = self._container.metadata.get("model_id")
        return model_id

    @property
    def legacy_source(self) -> bool:
        """Whether it was made of bare weights that came without a container."""
        return self._legacy_checksum is not None

    @property
    def format_version(self) -> int:
        """The container's version."""
        return self._container.format_version

    @property
    def size(self) -> int:
        """Bytes of the whole container."""
        return self._container.source.size

    # Weights

    @property
    def has_training_model(self) -> bool:
        """Whether there are weights."""
        return layout.TRAINING_MODEL in self._container.entries

    def get_training_model(self, helper: Helper | None = None) -> Any:
        """Return the weights; numpyhelper's are read-only arrays, to be copied before a change."""
        helper = helper or self._helper or self._helper_from_metadata()
        require_helper(helper, "load")
        with self.get_training_model_stream() as stream:
            return helper.load(stream)

    def get_model_params(self, helper: Helper | None = None) -> Any:
        """Return the weights; the deprecated name of `get_training_model`."""
        warnings.warn("get_model_params is deprecated; use get_training_model", DeprecationWarning, stacklevel=2)
        return self.get_training_model(helper)

    def get_training_model_stream(self) -> ViewStream:
        """Return the weights' bytes as a file, to be used in a with statement."""
        container = self._container
        return ViewStream(container.content(layout.TRAINING_MODEL), limits=container.weights_limits)

    # Inference model and files

    @property
    def has_inference_model(self) -> bool:
        """Whether there is an inference model."""
        return layout.INFERENCE_MODEL in self._container.entries

    def get_inference_model_format(self) -> str | None:
        """Return the inference model's format, as given when it was set, or None."""
        model_format: str | None = self._container.metadata.get("inference_model_format")
        return model_format

    def get_inference_model_stream(self) -> ViewStream:
        """Return the inference model's bytes as a file, to be used in a with statement."""
        return ViewStream(self._container.content(layout.INFERENCE_MODEL))

    def list_files(self) -> list[str]:
        """Return the names of attached files."""
        return list(self._container.files)

    def has_file(self, name: str) -> bool:
        """Say whether a file of that name is attached."""
        return name in self._container.files

    def open_file(self, name: str) -> ViewStream:
        """Return an attached file, for a with statement; KeyError when there is none of that name."""
        if not self.has_file(name):
            raise KeyError(f"the model has no file {name!r}")
        return ViewStream(self._container.content(layout.FILES + name))

    def get_file(self, name: str) -> bytes:
        """Return the bytes of an attached file; KeyError when there is none of that name."""
        with self.open_file(name) as stream:
            return stream.read()

    # Checksum and signature

    @property
    def checksum(self) -> str:
        """SHA-256 of the whole container in hex; computed once, off the event loop where there is one."""
        return self._container.source.sha256()

    def verify_checksum(self, checksum: str | None) -> bool:
        """Compare a checksum with the container's or, of a legacy model, with the received bytes'.

        None is no checksum, and passes.
        """
        return checksum is None or checksum.lower() in {self.checksum, self._legacy_checksum}

    def verify(self) -> None:
        """Compare all contents with their CRC-32 now; ModelFormatError when some are damaged."""
        self._container.verify()

    def sign(self, private_key: Ed25519PrivateKey, signer_id: str | None = None) -> dict[str, Any]:
        """Return the model's signature as the server's model-signatures endpoint takes it."""
        from scaleout_mp.model.signing import sign_digest

        signature = sign_digest(self._container.content_digest(), private_key, signer_id)
        return {**signature, "model_id": self.model_id}

    def verify_signature(self, public_key: Ed25519PublicKey, signature: str | bytes | Mapping[str, Any]) -> bool:
        """Say whether a signature, as base64 or as `sign` returned it, is this model's."""
        from scaleout_mp.model.signing import verify_digest

        return verify_digest(self.signed_digest(), public_key, signature)

    def signed_digest(self) -> bytes:
        """Return what a signature signs: a SHA-256 over the contents. Reads the whole model."""
        return self._container.content_digest()

    # The bytes

    def to_builder(self) -> ScaleoutModelBuilder:
        """Return a builder that begins with this model's contents; this model stays as it is."""
        from scaleout_mp.model.builder import ScaleoutModelBuilder

        return ScaleoutModelBuilder.from_model(self)

    def save_to_file(self, file_path: str | os.PathLike[str]) -> None:
        """Write the container to a file, replacing it whole; from then on this model refers to that file."""
        source = self._container.source
        fd = replace_and_open(file_path, *source.pieces(), sync=False)
        # The memory goes with the last reference to it: another thread may be reading it.
        self._container.source = source.moved_to(fd)

    def get_file_stream(self) -> ViewStream:
        """Return the whole container as a file."""
        return ViewStream(self._container.source.view())

    def get_filechunk_stream(self, chunk_size: int = CHUNK_SIZE) -> Iterator[FileChunk]:
        """Yield the container as gRPC messages."""
        from scaleout_mp.wire.edge_pb2 import FileChunk

        for chunk in self.iter_chunks(chunk_size):
            yield FileChunk(data=bytes(chunk))

    def iter_chunks(self, chunk_size: int = CHUNK_SIZE) -> Iterator[memoryview]:
        """Yield the container as views of its memory, without a copy; none is longer than `chunk_size` bytes."""
        if chunk_size < 1:
            raise ValueError("the chunk size must be positive")
        for piece in self._container.source.pieces():
            for start in range(0, len(piece), chunk_size):
                yield piece[start : start + chunk_size]

    def fileno(self) -> int:
        """Return the descriptor of the container, for another process; it stays this model's."""
        return self._container.source.fileno()

    @property
    def closed(self) -> bool:
        """Whether the model was closed."""
        return self._container.source.closed

    def close(self) -> None:
        """Give the memory back, as soon as no array over it is left. Safe to call again."""
        self._container.source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        helper = self._container.metadata.get("helper_type", "?")
        state = " closed" if self.closed else ""
        return f"<ScaleoutModel model_id={self.model_id} helper={helper} size={self.size:,} bytes{state}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows of it; the weights are not read."""
        facts = [("size", readable_size(self.size))]
        if self.closed:
            facts.append(("state", "closed"))
        metadata = {name: value for name, value in self._container.metadata.items() if name != "model_id"}
        facts += [(name, str(value)) for name, value in list(metadata.items())[:_SHOWN]]
        if len(metadata) > _SHOWN:
            facts.append(("…", f"{len(metadata) - _SHOWN} more"))
        files = self.list_files()
        if files:
            more = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
            facts.append(("files", ", ".join(files[:_SHOWN]) + more))
        return html_table(f"ScaleoutModel {self.model_id}", facts)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a ScaleoutModel cannot be pickled: its bytes go between processes by descriptor. "
            "Pass it to a task as an argument, return it as the result, or use save_to_file."
        )

    def _helper_from_metadata(self) -> Helper:
        name = self._container.metadata.get("helper_type")
        if name is None:
            raise ModelFormatError("the model does not say which helper reads its weights: pass helper=")
        try:
            return get_helper(name)
        except ValueError as error:
            raise ModelFormatError(str(error)) from error


def _detect(view: memoryview) -> str:
    try:
        return "zip" if layout.is_container(view) else "legacy"
    except ModelFormatError:
        return "legacy"
