"""Disk and file system: files that are too large, too many or too odd, and folders that are taken away."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket

from fault_catalogue import fault

from scaleout_mp import EndReason, Limits

COMPLETED, FILE_SIZE = EndReason.COMPLETED, EndReason.FILE_SIZE
SMALL_FILES = Limits(file_size="1MiB", abort_grace=0.3)
MIB = 1 << 20


def _own_folder(place):
    """Return the task's scratch folder, or at a level without one a folder of this fault."""
    here = os.getcwd()
    if here == place.supervisor_folder:
        os.chdir(place.folder)
    return os.getcwd()


def _keep_file(place):
    """Make a file that no removal may touch, and return its path; `_kept` looks for it."""
    path = f"{place.folder}/kept"
    with open(path, "w") as file:
        file.write("kept")
    return path


def _kept(_, place):
    with open(f"{place.folder}/kept") as file:
        assert file.read() == "kept"


@fault(FILE_SIZE, limits=SMALL_FILES, says="limit of 1.0 MiB")
def a_file_past_its_limit(place):
    _own_folder(place)
    with open("large", "wb", buffering=0) as file:
        file.write(bytes(MIB))
        file.write(b"x")


@fault(FILE_SIZE, limits=SMALL_FILES)
def a_file_past_its_limit_with_the_signal_on(place):
    """As in programs that are not Python's, the kernel's signal ends the process."""
    _own_folder(place)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    with open("large", "wb", buffering=0) as file:
        file.write(bytes(MIB))
        file.write(b"x")


@fault(FILE_SIZE, limits=SMALL_FILES)
def a_hole_past_the_limit(place):
    _own_folder(place)
    with open("sparse", "wb") as file:
        file.truncate(1 << 40)


@fault(FILE_SIZE, limits=SMALL_FILES)
def a_memfd_past_the_limit(_):
    descriptor = os.memfd_create("large")
    for _ in range(5):
        os.write(descriptor, bytes(MIB))


@fault(COMPLETED, returns="done")
def a_folder_full_of_files(place):
    _own_folder(place)
    for number in range(3000):
        os.close(os.open(str(number), os.O_CREAT | os.O_WRONLY))
    return "done"


@fault(COMPLETED, returns="done")
def fifty_megabytes_in_files(place):
    _own_folder(place)
    for number in range(5):
        with open(str(number), "wb") as file:
            file.write(bytes(10 * MIB))
    return "done"


@fault(COMPLETED, returns="done")
def folders_deeper_than_any_path(place):
    _own_folder(place)
    for _ in range(400):
        os.mkdir("a" * 100)
        os.chdir("a" * 100)
    return "done"


@fault(COMPLETED, returns="done")
def its_own_folder_removed(place):
    folder = _own_folder(place)
    with contextlib.suppress(PermissionError):
        os.rmdir(folder)
    return "done"


@fault(COMPLETED, returns="done")
def its_own_folder_moved(place):
    folder = _own_folder(place)
    if folder != place.folder:
        with contextlib.suppress(OSError):
            os.rename(folder, f"{place.folder}/moved")
    return "done"


@fault(COMPLETED, returns="done", check=_kept)
def its_own_folder_is_a_link_now(place):
    _keep_file(place)
    folder = _own_folder(place)
    if folder != place.folder:
        with contextlib.suppress(PermissionError):
            os.rmdir(folder)
            os.symlink(place.folder, folder)
    return "done"


@fault(COMPLETED, returns="done", check=_kept)
def links_that_lead_outside(place):
    kept = _keep_file(place)
    _own_folder(place)
    os.symlink(kept, "link to a file")
    os.symlink(place.folder, "link to a folder")
    os.symlink("/", "link to all")
    os.symlink("link to itself", "link to itself")
    with contextlib.suppress(OSError):
        os.link(kept, "hard link")
    return "done"


@fault(COMPLETED, returns="done")
def folders_without_permissions(place):
    _own_folder(place)
    os.makedirs("closed/inside")
    with open("closed/inside/file", "w") as file:
        file.write("x")
    for path in ("closed/inside/file", "closed/inside", "closed", "."):
        os.chmod(path, 0)
    return "done"


@fault(COMPLETED, returns="done")
def names_that_are_no_names(place):
    folder = os.fsencode(_own_folder(place))
    for name in (b"\xff\xfe", b"line\nline", b"\x1b[2J", b" ", b"-rf", b"..." * 80):
        os.mkdir(folder + b"/" + name)
        os.close(os.open(folder + b"/" + name + b"/" + name, os.O_CREAT | os.O_WRONLY))
    return "done"


@fault(COMPLETED, returns="done")
def what_is_no_file(place):
    _own_folder(place)
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
    return "done"


@fault(COMPLETED, returns="done", note="had to be killed")
def a_daemon_that_goes_on_writing(place):
    _own_folder(place)
    if os.fork() == 0:
        os.setsid()
        number = 0
        while True:
            number += 1
            os.makedirs(str(number % 1000), exist_ok=True)
    while len(os.listdir()) < 10:
        pass
    return "done"


@fault(COMPLETED, returns="done")
def the_root_as_its_folder(_):
    os.chdir("/")
    os.umask(0o777)
    return "done"


@fault(EndReason.CRASHED, signal="SIGKILL")
def killed_amid_its_files(place):
    _own_folder(place)
    for number in range(100):
        os.makedirs(f"{number}/{number}")
    os.kill(os.getpid(), signal.SIGKILL)


@fault(COMPLETED, returns="done")
def everything_in_its_folder_removed_twice(place):
    folder = _own_folder(place)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    return "done"
