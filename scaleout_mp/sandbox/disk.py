"""How many bytes of the disk a folder takes, with files in it that have no name any more.

No path is followed, no link and no mount: each folder is opened by its parent's descriptor. Facts: inode(7), proc(5).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from typing import TYPE_CHECKING, Final

from scaleout_mp.sandbox.removal import OPEN, mount_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: Of `st_blocks`, whatever the file system's own are.
_BLOCK: Final = 512
#: What an entry takes beside its content, at least: a million empty files are not nothing.
_ENTRY: Final = 512
#: Folders within folders that are followed: each holds a descriptor open.
MOST_DEPTH: Final = 64
_CLOSED: Final = "folders that cannot be read"
_OTHER: Final = "another folder that is mounted on it"


@dataclasses.dataclass(kw_only=True)
class DiskUse:
    """What was found."""

    #: Bytes.
    size: int = 0
    entries: int = 0
    #: What could not be measured; empty: nothing of the kind.
    unmeasured: str = ""
    #: Files that are counted once, however many names or descriptors they have.
    _seen: set[tuple[int, int]] = dataclasses.field(default_factory=set)

    def add(self, status: os.stat_result, *, shared: bool) -> None:
        """Count a file; `shared`: it may come up again."""
        self.entries += 1
        if shared:
            key = (status.st_dev, status.st_ino)
            if key in self._seen:
                return
            self._seen.add(key)
        self.size += status.st_blocks * _BLOCK + _ENTRY


def measure(folder: str, pids: Iterable[int], *, most: int) -> DiskUse:
    """Measure a folder, and the nameless files in it that the processes `pids` have open.

    Ends as soon as more than `most` bytes are found. Takes a few microseconds for each file and descriptor. Raises
    OSError when this process has no descriptors left.
    """
    use = DiskUse()
    try:
        mount = _mount_around(folder)
        top = os.open(folder, OPEN)
    except PermissionError:
        use.unmeasured = _CLOSED
        return use
    except OSError as error:
        if error.errno not in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
            raise
        # The task has removed it, or put something else in its place.
        return use
    with contextlib.ExitStack() as opened:
        if _is_on(mount, top):
            _walk(top, mount, use, most, opened)
        else:
            use.unmeasured = _OTHER
    for pid in pids:
        if use.size > most:
            break
        _add_nameless(f"{folder}/", pid, use)
    return use


def _walk(top: int, mount: tuple[bytes, int], use: DiskUse, most: int, opened: contextlib.ExitStack) -> None:
    levels: list[tuple[contextlib.ExitStack, int, Iterator[os.DirEntry[str]]]] = []

    def enter(descriptor: int) -> None:
        level = opened.enter_context(contextlib.ExitStack())
        level.callback(os.close, descriptor)
        levels.append((level, descriptor, level.enter_context(os.scandir(descriptor))))

    enter(top)
    while levels and use.size <= most:
        level, descriptor, entries = levels[-1]
        entry = next(entries, None)
        if entry is None:
            level.close()
            levels.pop()
            continue
        # Files come and go meanwhile.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = entry.stat(follow_symlinks=False)
            is_folder = entry.is_dir(follow_symlinks=False)
            use.add(status, shared=status.st_nlink > 1 and not is_folder)
            if not is_folder:
                continue
            if len(levels) >= MOST_DEPTH:
                use.unmeasured = f"folders nested more than {MOST_DEPTH} deep"
                continue
            try:
                inner = os.open(entry.name, OPEN, dir_fd=descriptor)
            except PermissionError:
                use.unmeasured = _CLOSED
                continue
            # What is mounted there takes nothing of this folder.
            if _is_on(mount, inner):
                enter(inner)


def _mount_around(folder: str) -> tuple[bytes, int]:
    parent = os.open(os.path.dirname(folder), OPEN)
    try:
        return mount_of(parent)
    finally:
        os.close(parent)


def _is_on(mount: tuple[bytes, int], folder: int) -> bool:
    """Whether an opened folder is on a mount; where it is not, it is closed."""
    same = False
    try:
        same = mount_of(folder) == mount
    finally:
        if not same:
            os.close(folder)
    return same


def _add_nameless(inside: str, pid: int, use: DiskUse) -> None:
    """Count the files without a name that were made in a folder and are open in a process."""
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return
    for descriptor in descriptors:
        path = f"/proc/{pid}/fd/{descriptor}"
        with contextlib.suppress(OSError):
            if os.readlink(path).startswith(inside):
                status = os.stat(path)
                if status.st_nlink == 0:
                    use.add(status, shared=True)
