"""Making models: from weights, from bytes, and from other models."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Self

from scaleout_mp.errors import ModelError
from scaleout_mp.model import container as layout
from scaleout_mp.model.checksums import crc32
from scaleout_mp.model.container import DEFAULT_LIMITS, NO_LIMITS, Container, ContainerLimits
from scaleout_mp.model.deflate import COMPRESSIONS, Compression, sample_of
from scaleout_mp.model.entry_sink import EntrySink
from scaleout_mp.model.helpers import Helper, get_helper, require_helper
from scaleout_mp.model.memfd import DEFAULT_MAX_SIZE, MappedBytes, MemoryFile, MemoryWriter, SealedMemory
from scaleout_mp.model.scaleout_model import ScaleoutModel
from scaleout_mp.model.zip_reader import ArchiveLimits
from scaleout_mp.model.zip_writer import ZipWriter

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from scaleout_mp.wire.edge_pb2 import FileChunk

logger = logging.getLogger(__name__)

_READ_STEP: Final = 1 << 20
_UNSET: Final = object()


class ScaleoutModelBuilder:
    """Collects what a model is made of, and makes it. Each setter returns the builder.

    The model id: a model from weights gets a fresh one, always. A loaded model keeps its id until its
    contents or metadata change, which gives a fresh one, or `set_model_id` says which. A model_id among
    metadata is ignored.
    """

    def __init__(self) -> None:
        self._source: Container | None = None
        self._legacy: MappedBytes | None = None
        self._legacy_checksum: str | None = None
        self._weights_limits: ArchiveLimits | None = None
        self._is_new = False
        self._helper: Helper | None = None
        self._weights: Any = _UNSET
        self._weights_used = False
        self._metadata: dict[str, Any] = {}
        self._model_id: str | None = None
        self._inference: bytes | SealedMemory | None = None
        self._files: dict[str, bytes | SealedMemory] = {}

    # Where it begins

    @classmethod
    def from_training_model(cls, model_params: Any, helper: Helper | None = None) -> Self:
        """Begin a new model with weights; numpyhelper unless another helper is given."""
        builder = cls().set_training_model(model_params, helper)
        builder._is_new = True  # noqa: SLF001 - the same class
        return builder

    @classmethod
    def from_file(cls, file_path: str | os.PathLike[str], *, limits: ContainerLimits = DEFAULT_LIMITS) -> Self:
        """Begin with a file, which is used where it lies."""
        return cls._from_source(MappedBytes.open(file_path), limits)

    @classmethod
    def from_stream(cls, stream: BinaryIO, *, limits: ContainerLimits = DEFAULT_LIMITS) -> Self:
        """Begin with the bytes from a stream's position to its end."""
        return cls._from_source(_drain(stream, limits.max_size), limits)

    @classmethod
    def from_filechunk_stream(
        cls, filechunk_stream: Iterable[FileChunk], *, limits: ContainerLimits = DEFAULT_LIMITS
    ) -> Self:
        """Begin with the bytes of gRPC messages."""
        with MemoryWriter(max_size=limits.max_size) as writer:
            for chunk in filechunk_stream:
                writer.write(chunk.data)
            return cls._from_source(writer.seal(), limits)

    @classmethod
    def from_memory(cls, memory: MappedBytes, *, limits: ContainerLimits = DEFAULT_LIMITS) -> Self:
        """Begin with sealed memory or a mapped file, whose owner the builder becomes."""
        return cls._from_source(memory, limits)

    @classmethod
    def from_model(cls, model: ScaleoutModel) -> Self:
        """Begin with a model's contents; the model may be closed afterwards."""
        builder = cls()
        builder._source = model._container.dup()  # noqa: SLF001 - the other half of the same class
        builder._weights_limits = builder._source.weights_limits
        builder._helper = model._helper  # noqa: SLF001
        builder._legacy_checksum = model._legacy_checksum  # noqa: SLF001
        return builder

    @classmethod
    def _from_source(cls, source: MappedBytes, limits: ContainerLimits) -> Self:
        builder = cls()
        try:
            if layout.is_container(source.view(), limits):
                builder._source = Container(source, limits=limits)
                builder._weights_limits = builder._source.weights_limits
            else:
                layout.check_size(source, limits)
                builder._legacy = source
                builder._weights_limits = ArchiveLimits(max_entries=limits.max_arrays, max_inflated=limits.max_inflated)
                builder._legacy_checksum = source.sha256()
        except BaseException:
            source.close()
            raise
        return builder

    # What to change

    def set_metadata(self, key: str, value: Any) -> Self:
        """Set one key; the value must be JSON."""
        self._metadata[key] = value
        return self

    def set_metadata_dict(self, metadata: Mapping[str, Any]) -> Self:
        """Set several keys."""
        self._metadata.update(metadata)
        return self

    def set_model_id(self, model_id: str) -> Self:
        """Choose the id of a loaded model. A new model keeps its fresh id, with a warning."""
        if not isinstance(model_id, str):
            raise TypeError(f"a model id must be a string, not {type(model_id).__name__}")
        if not model_id:
            raise ValueError("a model id must not be empty")
        self._model_id = model_id
        return self

    def set_helper(self, helper: Helper) -> Self:
        """Choose the helper that writes and reads the weights. Raises TypeError when it is none."""
        require_helper(helper, "save", "load")
        self._helper = helper
        return self

    def set_helper_type(self, helper_type: str) -> Self:
        """Choose the helper by name."""
        return self.set_helper(get_helper(helper_type))

    def set_training_model(self, model_params: Any, helper: Helper | None = None) -> Self:
        """Replace the weights. They are read when the model is built, an iterator's for one model only."""
        if helper is not None:
            self.set_helper(helper)
        self._weights = model_params
        self._weights_used = False
        return self

    def set_inference_model(self, data: bytes, fmt: str) -> Self:
        """Set the inference model and its format, "onnx" for example."""
        self._inference = _require_bytes(data)
        self._metadata["inference_model_format"] = fmt
        return self

    def set_inference_model_stream(self, stream: BinaryIO, fmt: str) -> Self:
        """Set the inference model from a stream, which is read now."""
        self._inference = _drain(stream)
        self._metadata["inference_model_format"] = fmt
        return self

    def set_file(self, name: str, data: bytes) -> Self:
        """Attach a file under a plain name, in place of one that has it."""
        _require_bytes(data)
        layout.check_file_name(name)
        self._files[name] = data
        return self

    def set_file_stream(self, name: str, stream: BinaryIO) -> Self:
        """Attach a file from a stream, which is read now."""
        layout.check_file_name(name)
        self._files[name] = _drain(stream)
        return self

    # The result

    def build(self, *, compression: Compression = "auto", checksum: bool = False) -> ScaleoutModel:
        """Make the model. What comes from a loaded model is taken over as it is, whatever the compression.

        `compression`: "stored" leaves new contents as they are, so that arrays are used in place; "deflate" deflates
        them; "auto" deflates an entry when a sample shows that this saves at least 10 %. `checksum`: hash the bytes
        while they are written, on another core, for a checksum that will be asked for soon.
        """
        if compression not in COMPRESSIONS:
            raise ValueError(f"compression must be one of {', '.join(COMPRESSIONS)}, not {compression!r}")
        source = self._source
        if source is not None and not self._changes_source(source):
            return self._finish(source.dup())
        if source is not None and not self._changes_contents():
            relabelled = source.with_metadata(self._final_metadata(self._helper))
            if relabelled is not None:
                return self._finish(relabelled)
        with MemoryFile(hashing=checksum) as file:
            writer = ZipWriter(file)
            helper = self._write_contents(writer, file, compression)
            # Last, because it is all that changes when only the id does.
            writer.add(layout.METADATA, layout.encode_metadata(self._final_metadata(helper)))
            writer.finish()
            memory = file.seal()
        # What was taken over from an unchecked source is not known to be whole by being copied.
        trusted = source is None or source.trusted
        container = Container(memory, trusted=trusted, limits=NO_LIMITS, entries=writer.entries)
        if self._weights is _UNSET and self._weights_limits is not None:
            container.weights_limits = self._weights_limits
        return self._finish(container)

    def _changes_contents(self) -> bool:
        return self._weights is not _UNSET or self._inference is not None or bool(self._files)

    def _changes_source(self, source: Container) -> bool:
        if self._changes_contents() or self._metadata:
            return True
        return self._model_id is not None and self._model_id != source.metadata.get("model_id")

    def _finish(self, container: Container) -> ScaleoutModel:
        return ScaleoutModel._create(  # noqa: SLF001
            container, helper=self._helper, legacy_checksum=self._legacy_checksum
        )

    def _write_contents(self, writer: ZipWriter, file: MemoryFile, compression: Compression) -> Helper | None:
        """Write everything but the metadata; returns the helper whose name the metadata must bear."""
        helper = self._helper
        written = {layout.METADATA}
        if self._weights is not _UNSET:
            helper = helper or self._helper_of_source() or get_helper("numpyhelper")
            if self._weights_used and isinstance(self._weights, Iterator):
                raise ModelError("the weights came from an iterator, and an earlier build used them up: give a list")
            self._weights_used = True
            with _entry(writer, file, layout.TRAINING_MODEL, compression) as entry:
                helper.save(self._weights, entry)
            written.add(layout.TRAINING_MODEL)
        for name, content in self._new_entries():
            _write_bytes(writer, file, name, memoryview(content), compression)
            written.add(name)
        if self._source is not None:
            for name, taken in self._source.entries.items():
                if name not in written:
                    writer.add_raw(self._source.source, taken)
        return helper

    def _new_entries(self) -> Iterator[tuple[str, bytes | memoryview]]:
        """Yield what is new beside weights from a helper."""
        if self._legacy is not None and self._weights is _UNSET:
            yield layout.TRAINING_MODEL, self._legacy.view()
        if self._inference is not None:
            yield layout.INFERENCE_MODEL, _bytes_of(self._inference)
        for name, data in self._files.items():
            yield layout.FILES + name, _bytes_of(data)

    def _helper_of_source(self) -> Helper | None:
        name = self._source.metadata.get("helper_type") if self._source is not None else None
        return get_helper(name) if name is not None else None

    def _final_metadata(self, helper: Helper | None) -> dict[str, Any]:
        loaded = self._source.metadata if self._source is not None else {}
        metadata = {**loaded, **self._metadata}
        if helper is not None and self._weights is not _UNSET:
            metadata["helper_type"] = helper.name
        elif helper is not None:
            metadata.setdefault("helper_type", helper.name)
        if self._model_id is not None and not self._is_new:
            metadata["model_id"] = self._model_id
            return metadata
        if self._model_id is not None:
            logger.warning(
                "a model from weights gets a fresh id, not %r: use to_builder().set_model_id() on the result",
                self._model_id,
                extra={"action": "model_id_ignored"},
            )
        metadata["model_id"] = str(uuid.uuid4())
        return metadata


@contextlib.contextmanager
def _entry(writer: ZipWriter, file: MemoryFile, name: str, compression: Compression) -> Iterator[EntrySink]:
    """Give a file whose bytes become an entry; after an error the archive is of no use."""
    entry = EntrySink(writer, file, name, compression)
    try:
        yield entry
    except BaseException:
        entry.abandon()
        raise
    entry.close()


def _write_bytes(writer: ZipWriter, file: MemoryFile, name: str, content: memoryview, compression: Compression) -> None:
    with _entry(writer, file, name, compression) as entry:
        if entry.decide(sample_of([content]), content.nbytes):
            entry.announce(size=content.nbytes, crc=crc32(content))
        entry.write(content)


def _bytes_of(data: bytes | SealedMemory) -> bytes | memoryview:
    return data.view() if isinstance(data, SealedMemory) else data


def _require_bytes(data: object) -> bytes:
    if not isinstance(data, bytes):
        raise TypeError(f"data must be bytes, not {type(data).__name__}")
    return data


def _drain(stream: BinaryIO, max_size: int = DEFAULT_MAX_SIZE) -> SealedMemory:
    with MemoryWriter(max_size=max_size) as writer:
        while chunk := stream.read(_READ_STEP):
            writer.write(chunk)
        if chunk is None:
            # What a non-blocking stream says for "nothing yet" would pass for the end.
            raise ModelError("the stream does not block: a model cannot be read from it")
        return writer.seal()
