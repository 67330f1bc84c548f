"""Removes a folder whatever was left in it, and nothing else: without recursion, and through no link and no mount.

A path can be nested deeper than any stack or descriptor table is long, and longer than the kernel takes. So no path is
followed: what lies in a subfolder is unlinked, and folders in it are moved up, until nothing is below the top. Each
folder is opened by its parent's descriptor, found to be one, and moved and emptied once. What a task has mounted there,
another folder of the same disk for example, is left: only its mount tells it from a folder of the task's own. Facts:
openat(2), rename(2), proc_pid_fdinfo(5), FS_IOC_SETFLAGS(2const).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import secrets
import stat
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

#: Opens a folder, and never a link to one. With O_PATH it needs no permission on the folder itself.
_FOLDER_ITSELF: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: Opens a folder to be read and locked.
OPEN: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_USABLE: Final = 0o700
#: Read and set what chattr(1) sets, on machines of 64 bits, and of that what stands in the way: immutable, append-only.
_GET_FLAGS: Final = 0x80086601
_SET_FLAGS: Final = 0x40086602
_FIXED: Final = 0x10 | 0x20
#: The line of a descriptor's file in /proc that says on which mount it is.
_MOUNT: Final = b"mnt_id:"
#: What unlink(2) and rmdir(2) say of a folder that has to be emptied, and of one on which something is mounted.
_NOT_YET: Final = frozenset({errno.ENOTEMPTY, errno.EBUSY})


@dataclasses.dataclass(kw_only=True)
class Removal:
    """One removal. It may take long, a second for some 100,000 files: run it on a thread."""

    #: Asked between two entries; True ends the removal where it is.
    give_up: Callable[[], bool] = lambda: False
    #: The first thing that could not be removed, and why.
    problem: OSError | None = None
    _lifted: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))
    _count: int = 0
    #: Where the folder is that is removed, as `mount_of` has it.
    _mount: tuple[bytes, int] = (b"", 0)

    def remove(self, name: str, folder: int) -> bool:
        """Remove the entry `name` of the open `folder`, whatever it is; return whether it is gone.

        What is mounted on it or below stays as it is, and so does the way to it.
        """
        if self._unlink(name, folder):
            return True
        self._attempt(lambda: self._remove_folder(name, folder))
        return not _is_there(name, folder)

    def _remove_folder(self, name: str, folder: int) -> None:
        self._mount = mount_of(folder)
        top = self._open_usable(name, folder)
        try:
            self._empty(top)
        finally:
            os.close(top)
        if not self.give_up():
            os.rmdir(name, dir_fd=folder)

    def _unlink(self, name: str, folder: int) -> bool:
        """Remove what is no folder, or an empty one. False: it is a folder with something in it, or it stays."""
        try:
            try:
                os.unlink(name, dir_fd=folder)
            except PermissionError:
                if not _loosen_file(name, folder):
                    raise
                os.unlink(name, dir_fd=folder)
        except FileNotFoundError:
            return True
        except IsADirectoryError:
            try:
                os.rmdir(name, dir_fd=folder)
            except FileNotFoundError:
                return True
            except OSError as error:
                if error.errno not in _NOT_YET:
                    self.problem = self.problem or error
                return False
        except OSError as error:
            self.problem = self.problem or error
            return False
        return True

    def _empty(self, top: int) -> None:
        """Remove all that is in a folder; what cannot be removed stays, with all the rest gone."""
        while not self.give_up():
            before = self._count
            removed = 0
            with os.scandir(top) as entries:
                for entry in entries:
                    if self.give_up():
                        return
                    if self._unlink(entry.name, top):
                        removed += 1
                    elif entry.is_dir(follow_symlinks=False):
                        removed += self._lift(entry.name, top)
            if not removed and self._count == before:
                return

    def _lift(self, name: str, top: int) -> bool:
        """Empty a subfolder of the top into the top, and remove it; return whether it is gone."""
        try:
            folder = self._open_usable(name, top)
        except OSError as error:
            self.problem = self.problem or error
            return False
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if self.give_up():
                        return False
                    if not self._unlink(entry.name, folder) and entry.is_dir(follow_symlinks=False):
                        self._move_up(entry.name, folder, top)
        finally:
            os.close(folder)
        # Names that the scan missed, because others went while it ran, are found by the next one over the top.
        with contextlib.suppress(OSError):
            os.rmdir(name, dir_fd=top)
            return True
        return False

    def _move_up(self, name: str, folder: int, top: int) -> None:
        def move() -> None:
            # To move a folder is to write into it: its entry ".." changes.
            os.close(self._open_usable(name, folder))
            os.rename(name, f"{self._lifted}-{self._count}", src_dir_fd=folder, dst_dir_fd=top)
            self._count += 1

        self._attempt(move)

    def _open_usable(self, name: str, folder: int) -> int:
        """Open a subfolder for reading, and see to it that this user may read and change it.

        Raises OSError, with the path of it where something is mounted on it.
        """
        itself = os.open(name, _FOLDER_ITSELF, dir_fd=folder)
        try:
            # First of all: the answer to any question about the folder comes from whoever serves what is mounted.
            if mount_of(itself) != self._mount:
                path = os.readlink(f"/proc/self/fd/{itself}")
                raise OSError(errno.EXDEV, "something is mounted there, which is left as it is", path)
            usable = os.fstat(itself).st_mode & _USABLE == _USABLE
            # Through the descriptor: by name it could be another file by now.
            path = f"/proc/self/fd/{itself}"
            if not usable:
                # It may be immutable. Who can make it so, can open it.
                with contextlib.suppress(PermissionError):
                    os.chmod(path, _USABLE)
            opened = os.open(".", OPEN, dir_fd=itself)
            if _loosen(opened) and not usable:
                with contextlib.suppress(PermissionError):
                    os.chmod(path, _USABLE)
            return opened
        finally:
            os.close(itself)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            self.problem = self.problem or error


def remove_ownerless(name: str, folder: int, give_up: Callable[[], bool]) -> None:
    """Remove a subfolder of the open `folder` if it is this user's and nobody holds its lock."""
    try:
        subfolder = os.open(name, OPEN, dir_fd=folder)
    except OSError:
        # Of another user, a link, or gone.
        return
    try:
        if os.fstat(subfolder).st_uid != os.geteuid():
            return
        try:
            fcntl.flock(subfolder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            # Its owner lives. On a network file system this lock is always refused: nothing is removed there.
            return
        Removal(give_up=give_up).remove(name, folder)
    finally:
        os.close(subfolder)


def _loosen(descriptor: int) -> bool:
    """Make a file changeable that a privileged task has made immutable or append-only; return whether it was."""
    flags = bytearray(8)
    try:
        fcntl.ioctl(descriptor, _GET_FLAGS, flags)
        (old,) = struct.unpack_from("=I", flags)
        if not old & _FIXED:
            return False
        fcntl.ioctl(descriptor, _SET_FLAGS, struct.pack("=Q", old & ~_FIXED))
    except OSError:
        # A file system without such flags, or this process lacks the privilege.
        return False
    return True


def _loosen_file(name: str, folder: int) -> bool:
    try:
        if not stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            return False
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return False
    try:
        return _loosen(descriptor)
    finally:
        os.close(descriptor)


def mount_of(descriptor: int) -> tuple[bytes, int]:
    """Return what tells the mount that a descriptor is on: its number, or the device where the kernel tells no more.

    Folders of one device can be on several mounts, and one mount can show several devices, as with Btrfs.
    """
    try:
        file = os.open(f"/proc/self/fdinfo/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        # No /proc; or before Linux 5.14, to an ordinary user whose process is closed to others.
        return b"", os.fstat(descriptor).st_dev
    try:
        lines = os.read(file, 1 << 12).splitlines()
    finally:
        os.close(file)
    number = next((line for line in lines if line.startswith(_MOUNT)), b"")
    return (number, 0) if number else (b"", os.fstat(descriptor).st_dev)


def _is_there(name: str, folder: int) -> bool:
    try:
        # Without a question to what may be mounted there.
        os.close(os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder))
    except OSError as error:
        # Else: out of descriptors.
        return error.errno != errno.ENOENT
    return True
