"""The model container: a ZIP archive of metadata, weights, an inference model and attached files.

The names of entries and the rules for metadata are those of the published packages, 1.0.7 and 1.1.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any, Final, cast

from scaleout_mp.errors import IncompatibleModelFormatError, ModelError, ModelFormatError
from scaleout_mp.model import zip_reader
from scaleout_mp.model.memfd import DEFAULT_MAX_SIZE, Bytes
from scaleout_mp.model.spliced import splice
from scaleout_mp.model.zip_reader import ArchiveLimits
from scaleout_mp.model.zip_writer import ZipWriter

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from scaleout_mp.model.spliced import Backing
    from scaleout_mp.model.zip_reader import ZipEntry

METADATA: Final = "metadata.json"
TRAINING_MODEL: Final = "training_model.bin"
INFERENCE_MODEL: Final = "inference_model.bin"
FILES: Final = "files/"

FORMAT_VERSION: Final = 2

# The published packages changed the key in 1.1; the underscore keeps it apart from what users set.
_VERSION_KEY: Final = "_version"
_OLD_VERSION_KEY: Final = "version"

#: Lists and objects in one another. Python's own copying and writing of such values ends at some hundreds.
MAX_NESTING: Final = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContainerLimits:
    """What a model from outside may claim before it is refused with ModelFormatError. Sizes in bytes.

    Opening a model and reading its weights takes at most `max_size + max_inflated` of memory, and a few hundred bytes
    for each entry and array, and what the metadata become as Python objects.
    """

    #: The whole file.
    max_size: int = DEFAULT_MAX_SIZE
    #: All that has to be inflated: deflated entries, and deflated arrays in them, together. What is stored is used in
    #: place.
    max_inflated: int = 16 << 30
    #: Entries of the container: weights, inference model, files.
    max_entries: int = 4096
    #: Arrays among the weights.
    max_arrays: int = 1 << 17
    max_metadata: int = 16 << 20


DEFAULT_LIMITS: Final = ContainerLimits()

#: What a process builds is bounded by its memory, not by what it accepts from others.
NO_LIMITS: Final = ContainerLimits(
    max_size=1 << 62, max_inflated=1 << 62, max_entries=1 << 31, max_arrays=1 << 31, max_metadata=1 << 62
)


class Container:
    """An opened container: its directory and metadata are checked, its entries are read when asked for."""

    def __init__(
        self,
        source: Backing,
        *,
        trusted: bool = False,
        limits: ContainerLimits = DEFAULT_LIMITS,
        entries: Iterable[ZipEntry] | None = None,
    ) -> None:
        """Open and take ownership of `source`, which stays the caller's when this raises.

        `trusted`: its bytes were made or checked by this package; stored entries are not compared with
        their CRC-32. `entries`: what is in it, when that needs not be read from its directory.
        """
        check_size(source, limits)
        self.source = source
        self.entries: dict[str, ZipEntry]
        if entries is None:
            wanted = ArchiveLimits(max_entries=limits.max_entries, max_inflated=limits.max_inflated)
            self.entries = zip_reader.read_directory(source.view(), wanted)
        else:
            self.entries = {entry.name: entry for entry in entries}
        for name in self.entries:
            _check_entry_name(name)
        self.trusted = trusted
        inflated = sum(entry.size for entry in self.entries.values() if entry.method == zip_reader.DEFLATED)
        #: For the archive that the weights are.
        self.weights_limits = ArchiveLimits(
            max_entries=limits.max_arrays, max_inflated=max(0, limits.max_inflated - inflated)
        )
        self._checked: set[str] = set()
        self.metadata, self.format_version = self._read_metadata(limits)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of attached files, in the order of the directory."""
        return tuple(name[len(FILES) :] for name in self.entries if name.startswith(FILES) and name != FILES)

    def dup(self) -> Container:
        """Return a second owner of the same container; nothing is read again."""
        twin = copy.copy(self)
        twin.source = self.source.dup()
        twin._checked = set(self._checked)  # noqa: SLF001 - the same class
        return twin

    def with_metadata(self, metadata: Mapping[str, Any]) -> Container | None:
        """Return a container that differs in its metadata only and shares everything else.

        None where that cannot be: the bytes might change, as in a file, or the metadata do not stand last.
        """
        cut = self.entries[METADATA].header_offset
        kept = [entry for name, entry in self.entries.items() if name != METADATA]
        if any(entry.data_end > cut for entry in kept):
            return None
        tail = _Tail(cut)
        writer = ZipWriter(tail, start=0, entries=kept)
        writer.add(METADATA, encode_metadata(metadata))
        writer.finish()
        source = splice(self.source, cut, tail.data)
        if source is None:
            return None
        twin = Container(source, trusted=self.trusted, limits=NO_LIMITS, entries=writer.entries)
        twin.weights_limits = self.weights_limits
        twin._checked = self._checked - {METADATA}
        return twin

    def content(self, name: str) -> memoryview:
        """Return an entry's bytes, read-only; a stored entry is compared with its CRC-32 the first time."""
        entry = self.entries.get(name)
        if entry is None:
            raise ModelError(f"the model has no {name}")
        # Threads that race here compare twice, which is harmless.
        verify = not self.trusted and name not in self._checked
        if verify:
            self.source.will_read(entry.data_offset, entry.data_end)
        data = zip_reader.read_entry(self._raw(entry), entry, verify=verify)
        self._checked.add(name)
        return data

    def verify(self) -> None:
        """Compare every entry with its CRC-32, in little memory; ModelFormatError when one differs."""
        for name, entry in self.entries.items():
            self.source.will_read(entry.data_offset, entry.data_end)
            for _ in zip_reader.iter_entry(self._raw(entry), entry):
                pass
            self._checked.add(name)

    def _raw(self, entry: ZipEntry) -> memoryview:
        return self.source.span(entry.data_offset, entry.data_end)

    def content_digest(self) -> bytes:
        """Return the SHA-256 that signatures cover: each entry's name, NUL and bytes, by name."""
        digest = hashlib.sha256()
        for name in sorted(self.entries):
            digest.update(name.encode() + b"\0")
            for piece in zip_reader.iter_entry(self._raw(self.entries[name]), self.entries[name]):
                digest.update(piece)
        return digest.digest()

    def _read_metadata(self, limits: ContainerLimits) -> tuple[dict[str, Any], int]:
        if METADATA not in self.entries:
            raise ModelFormatError(f"the archive has no {METADATA}")
        entry = self.entries[METADATA]
        if entry.size > limits.max_metadata:
            raise ModelFormatError(f"{METADATA} is larger than the {limits.max_metadata:,} bytes that are allowed")
        # Small, and everything depends on it: compared even when the source is trusted.
        data = zip_reader.read_entry(self._raw(entry), entry, verify=True)
        try:
            metadata = json.loads(bytes(data))
        except (ValueError, RecursionError) as error:
            raise ModelFormatError(f"{METADATA} is not JSON: {error}") from error
        if not isinstance(metadata, dict):
            raise ModelFormatError(f"{METADATA} is not a JSON object")
        if _is_nested_deeper(metadata, MAX_NESTING):
            raise ModelFormatError(f"{METADATA} is nested deeper than the {MAX_NESTING} levels that are allowed")
        version = _take_version(metadata)
        for key in ("model_id", "helper_type", "inference_model_format"):
            value: object = metadata.get(key)
            if value is not None and not isinstance(value, str):
                raise ModelFormatError(f"{METADATA} has a {key} that is not a string")
        return metadata, version


def check_size(source: Backing, limits: ContainerLimits) -> None:
    """Raise ModelFormatError when a model is larger than allowed."""
    if source.size > limits.max_size:
        raise ModelFormatError(f"the model has {source.size:,} bytes; {limits.max_size:,} are allowed")


def is_container(view: memoryview, limits: ContainerLimits = DEFAULT_LIMITS) -> bool:
    """Say whether bytes are a model container, as opposed to a legacy model: bare weights.

    A damaged archive raises ModelFormatError: it was a container or an .npz once, but is of no use as either. So does
    one with more entries than either may have.
    """
    if not len(view):
        raise ModelFormatError("the model is empty")
    if not zip_reader.looks_like_zip(view):
        return False
    # Bare weights of many arrays are an archive, too; how many entries a container may have is checked later.
    most = max(limits.max_entries, limits.max_arrays)
    return METADATA in zip_reader.read_directory(view, ArchiveLimits(max_entries=most))


class _Tail:
    """What comes behind the first bytes of an archive, in ordinary memory."""

    def __init__(self, size: int) -> None:
        #: Length of the archive so far, in bytes.
        self.size = size
        self.data = bytearray()

    def write(self, *parts: Bytes) -> int:
        """Append all parts."""
        written = sum(len(part) for part in parts)
        for part in parts:
            self.data += part
        self.size += written
        return written


def encode_metadata(metadata: Mapping[str, Any]) -> bytes:
    """Return the bytes of metadata.json; TypeError when a value is not JSON or nested too deep."""
    stamped: dict[str, Any] = {_VERSION_KEY: FORMAT_VERSION}
    if _OLD_VERSION_KEY in metadata:
        # In the second place it is known for the user's own: see `_take_version`.
        stamped[_OLD_VERSION_KEY] = metadata[_OLD_VERSION_KEY]
    stamped |= metadata
    stamped[_VERSION_KEY] = FORMAT_VERSION
    try:
        encoded = json.dumps(stamped).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"metadata must be JSON values: {error}") from error
    if _is_nested_deeper(stamped, MAX_NESTING):
        raise TypeError(f"metadata must not be nested deeper than {MAX_NESTING} levels")
    return encoded


def _is_nested_deeper(value: object, most: int) -> bool:
    """Say whether lists and objects lie more than `most` deep in one another."""
    level = [value]
    for _ in range(most):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else cast("list[object]", outer))
            if isinstance(inner, dict | list | tuple)
        ]
        if not level:
            return False
    return True


def check_file_name(name: object) -> None:
    """Raise ValueError unless the name of an attached file is a plain one."""
    if not isinstance(name, str) or not name or name == "." or ".." in name or set(name) & {"/", "\\", "\0"}:
        raise ValueError(f"{name!r} is not a plain file name")
    # UnicodeEncodeError, a ValueError as well, for half a surrogate pair.
    if len((FILES + name).encode()) > zip_reader.MAX_16:
        raise ValueError(f"{name[:40]!r}... is too long for a file name")


def _check_entry_name(name: str) -> None:
    if name.startswith(FILES) and name != FILES:
        try:
            check_file_name(name[len(FILES) :])
        except ValueError as error:
            raise ModelFormatError(f"entry {name!r} is not a plain file name") from error
    elif name.startswith("/") or "\\" in name or ".." in name.split("/"):
        raise ModelFormatError(f"entry {name!r} names a place outside of the model")


def _take_version(metadata: dict[str, Any]) -> int:
    """Remove the container's version from metadata and return it.

    The old key counts only where the new one is missing, for a user of the new format may have a "version"
    as well. One that equals the container's is a user's when both stand first, as only this package puts them; else
    a file that went through 1.0.7, which adds its own stamp to those that it does not know, would show that.
    """
    version: object = FORMAT_VERSION
    if _VERSION_KEY in metadata:
        is_users = list(metadata)[:2] == [_VERSION_KEY, _OLD_VERSION_KEY] and len(metadata) > 2
        version = metadata.pop(_VERSION_KEY)
        if metadata.get(_OLD_VERSION_KEY) == version and not is_users:
            del metadata[_OLD_VERSION_KEY]
    elif type(metadata.get(_OLD_VERSION_KEY)) is int:
        version = metadata.pop(_OLD_VERSION_KEY)
    if type(version) is not int:
        raise ModelFormatError(f"{METADATA} has a container version that is not a number: {version!r:.40}")
    if version > FORMAT_VERSION:
        raise IncompatibleModelFormatError(
            f"the model container is of version {version}, and this package reads up to {FORMAT_VERSION}: "
            "upgrade scaleout-mp"
        )
    return version
