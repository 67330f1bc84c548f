"""What tasks do in and to their scratch folders. Imported in task processes by name."""

from __future__ import annotations

import fcntl
import itertools
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time

from observing import open_descriptors

from scaleout_mp.task import current_task


def look_around():
    """Say where this task is."""
    scratch = os.environ["TMPDIR"]
    code = "import os; print(os.environ['TMPDIR'], end='')"
    return {
        **{name: os.environ[name] for name in ("TMPDIR", "TMP", "TEMP")},
        "tempfile": tempfile.gettempdir(),
        "temp folder": os.listdir(scratch),
        "mode": os.stat(scratch).st_mode,
        "mode of base": os.stat(os.path.dirname(scratch)).st_mode,
        "cwd": os.getcwd(),
        "child's TMPDIR": subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout,
    }


def _environment_of(pid):
    with open(f"/proc/{pid}/environ", "rb") as file:
        return file.read().decode().split("\0")


def _environment_of_parent():
    """Return the template's; None where it cannot be read."""
    try:
        return _environment_of(os.getppid())
    except (PermissionError, FileNotFoundError):
        return None


def look_for_secrets():
    """Return the environment as it is seen in each place that a task can look at."""
    code = "import os; print(*(f'{name}={value}' for name, value in os.environ.items()), sep='\\0', end='')"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return {
        "os.environ": [f"{name}={value}" for name, value in os.environ.items()],
        "own /proc": _environment_of("self"),
        "template's /proc": _environment_of_parent(),
        "child": child.split("\0"),
    }


def spy(supervisor):
    """Try to read a process; return the name of each error, "" for what could be read."""

    def read(name):
        with open(f"/proc/{supervisor}/{name}", "rb") as file:
            file.read(1)

    def outcome(action, *arguments):
        try:
            action(*arguments)
        except OSError as error:
            return type(error).__name__
        return ""

    with open("/proc/self/status") as file:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in file)
    return {
        "may trace": bool(int(status["CapEff"], 16) >> 19 & 1),
        "environ": outcome(read, "environ"),
        "maps": outcome(read, "maps"),
        "mem": outcome(os.open, f"/proc/{supervisor}/mem", os.O_RDONLY),
        "descriptors": outcome(os.readlink, f"/proc/{supervisor}/fd/0"),
        "cwd": outcome(os.listdir, f"/proc/{supervisor}/cwd"),
    }


def look_at_process():
    """Return what a task inherited or was given."""
    with open("/proc/self/oom_score_adj") as file:
        oom_score_adj = int(file.read())
    return {
        "descriptors": sorted(open_descriptors()),
        "pid": os.getpid(),
        "session": os.getsid(0),
        "group": os.getpgid(0),
        "oom_score_adj": oom_score_adj,
        "core": resource.getrlimit(resource.RLIMIT_CORE),
    }


def open_relative():
    with open("data/train.npz") as file:
        return file.read()


# Each leaves something that is not easily removed; `beside` is a folder outside, which must stay as it is.


def ordinary_files(beside):
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(b"x" * 100_000)
    os.makedirs("a/b/c")
    with open("a/b/c/file", "w"):
        pass


def deep_folders(beside):
    for number in range(5000):
        os.mkdir("d" * (1 + number % 200))
        os.chdir("d" * (1 + number % 200))
        if number % 500 == 0:
            with open("file", "w"):
                pass


def many_files(beside):
    for folder in range(20):
        os.mkdir(f"{folder}")
        for number in range(1000):
            os.close(os.open(f"{folder}/{number}", os.O_CREAT | os.O_WRONLY))


def links_to_outside(beside):
    os.makedirs("a/b")
    for place in (".", "a", "a/b"):
        os.symlink(beside, f"{place}/folder")
        os.symlink(f"{beside}/file", f"{place}/file")
        os.symlink("..", f"{place}/up")
    os.link(f"{beside}/file", "a/hard")


def forbidding_permissions(beside):
    for mode in (0o000, 0o100, 0o400, 0o500, 0o555):
        os.makedirs(f"{mode:o}/a/b")
        with open(f"{mode:o}/a/b/file", "w"):
            pass
        os.chmod(f"{mode:o}/a/b/file", 0)
        for folder in (f"{mode:o}/a/b", f"{mode:o}/a", f"{mode:o}"):
            os.chmod(folder, mode)
    os.chmod(".", 0)


def odd_names(beside):
    for name in (b"\xff\xfe", b"-rf", b" ", b"new\nline", b"...", b"x" * 255, "ü".encode()):
        os.mkdir(name)
        os.mkdir(os.path.join(name, name))


def other_kinds(beside):
    import socket

    os.mkfifo("pipe")
    os.mkdir("a")
    os.chdir("a")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("socket")
    os.symlink("nowhere", "dangling")


def a_link_in_its_place(beside):
    scratch = os.getcwd()
    os.rmdir(scratch)
    os.symlink(beside, scratch)


def a_file_in_its_place(beside):
    scratch = os.getcwd()
    os.rmdir(scratch)
    with open(scratch, "w"):
        pass


def gone(beside):
    os.rmdir(os.getcwd())


LITTER = (
    ordinary_files,
    deep_folders,
    many_files,
    links_to_outside,
    forbidding_permissions,
    odd_names,
    other_kinds,
    a_link_in_its_place,
    a_file_in_its_place,
    gone,
)


def _fill():
    with open("data", "w") as file:
        file.write("x")
    current_task().log_metric({"ready": 1.0})


def make_immutable():
    """Make files, folders and the scratch folder itself immutable or append-only; return why that cannot be done."""
    os.chdir(os.environ["TMPDIR"])
    for name in ("a", "b"):
        os.makedirs(f"{name}/below")
        for folder in (name, f"{name}/below"):
            with open(f"{folder}/file", "w") as file:
                file.write("x")
    os.chmod("b/below", 0)
    immutable, append_only = 0x10, 0x20
    try:
        for name, flag in (("a", immutable), ("b", append_only)):
            for path in (f"{name}/below/file", f"{name}/below", f"{name}/file", name):
                _set_flag(path, flag)
        _set_flag(".", immutable)
    except OSError as error:
        return str(error)
    return None


def _set_flag(path, flag):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # FS_IOC_GETFLAGS and FS_IOC_SETFLAGS; the file system has flags of its own.
        before = bytearray(8)
        fcntl.ioctl(descriptor, 0x80086601, before)
        fcntl.ioctl(descriptor, 0x40086602, struct.pack("=Q", struct.unpack("=Q", before)[0] | flag))
    finally:
        os.close(descriptor)


def crash():
    _fill()
    os.abort()


def hang():
    _fill()
    while True:
        time.sleep(100)


# Each writes into the scratch folder without an end, in its own way.

_PIECE = b"x" * (1 << 20)


def fill_one_file():
    with open("data", "wb", buffering=0) as file:
        while True:
            file.write(_PIECE)


def fill_nameless_file():
    with tempfile.TemporaryFile(buffering=0) as file:
        while True:
            file.write(_PIECE)


def fill_nameless_file_in_a_child():
    code = "import scratch_programs; scratch_programs.fill_nameless_file()"
    path = os.pathsep.join(filter(None, sys.path))
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True)


def fill_with_small_files():
    for number in itertools.count():
        if number % 1000 == 0:
            os.mkdir(f"{number // 1000}")
        os.close(os.open(f"{number // 1000}/{number}", os.O_CREAT | os.O_WRONLY))


def go_deep():
    while True:
        os.mkdir("d")
        os.chdir("d")


def close_it():
    os.makedirs("a/b")
    os.chmod("a", 0)
    time.sleep(60)


FILLING = (
    fill_one_file,
    fill_nameless_file,
    fill_nameless_file_in_a_child,
    fill_with_small_files,
    go_deep,
)


def stay_below(size):
    """Write that many bytes, once into a file with many names, and leave room in another."""
    with open("data", "wb") as file:
        file.write(b"x" * size)
    for number in range(20):
        os.link("data", f"name{number}")
    with open("sparse", "wb") as file:
        file.truncate(100 * size)
    time.sleep(0.5)
    return True


# Each leaves shared memory behind, registered with a resource tracker.


def _share():
    import multiprocessing
    from multiprocessing.shared_memory import SharedMemory

    memory = SharedMemory(create=True, size=1 << 20)
    lock = multiprocessing.get_context("spawn").Lock()
    names = [f"/dev/shm/{memory.name}", f"/dev/shm/sem.{lock._semlock.name.lstrip('/')}"]
    current_task().log_attributes({"names": " ".join(names)})
    return memory, lock


def share_and_hang():
    kept = _share()
    time.sleep(100)
    return kept is None


def share_and_crash():
    kept = _share()
    os.kill(os.getpid(), signal.SIGSEGV)
    return kept is None


def share_and_return():
    kept = _share()
    return kept is None


def pretend_to_be_a_tracker():
    """Leave a process behind that has a tracker's command line."""
    code = "#from multiprocessing.resource_tracker import main;main(5)\nimport time; print(flush=True); time.sleep(100)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    child.stdout.read(1)
    return child.pid


#: A program whose task stays at work; its argument is the scratch folder.
SUPERVISOR = """
import sys
import scratch_programs
from scaleout_mp import TaskExecutor

with TaskExecutor(echo_output=False, scratch_folder=sys.argv[1]) as executor:
    task = executor.submit(scratch_programs.hang)
    next(task.records())
    print("at work", flush=True)
    task.result()
"""

SHARING_SUPERVISOR = """
import sys
import scratch_programs
from scaleout_mp import TaskExecutor

with TaskExecutor(sandbox="basic", echo_output=False, scratch_folder=sys.argv[1]) as executor:
    task = executor.submit(scratch_programs.share_and_hang)
    print(next(task.records()).attributes["names"], flush=True)
    task.result()
"""


#: Mounts what is outside below scratch folders, which it then removes. Arguments: where they are made, the outside,
#: and what to mount. It prints what is gone, what is warned of, and what is left.
MOUNTING = """
import ctypes, json, logging, os, sys
from scaleout_mp.sandbox import disk, namespaces
from scaleout_mp.sandbox.scratch import ScratchFolders

BIND, RECURSIVE, PRIVATE = 0x1000, 0x4000, 0x40000
libc = ctypes.CDLL(None, use_errno=True)

def mount(source, target, kind, flags):
    if libc.mount(source.encode(), target.encode(), kind, flags, None) != 0:
        raise OSError(ctypes.get_errno(), "mount", target)

parent, beside, what = sys.argv[1:]
namespaces.enter_own_users()
namespaces.enter_own_mounts()
mount("none", "/", None, RECURSIVE | PRIVATE)
warned = []
handler = logging.Handler()
handler.emit = lambda record: warned.append(record.getMessage())
logging.getLogger("scaleout_mp").addHandler(handler)
folders = ScratchFolders.make_base(parent)
scratch = folders.make()
place = {"top": ".", "sub": "sub", "deep": "a/b/c", "other": "a/b"}[what]
os.makedirs(f"{scratch}/{place}/under", exist_ok=True)
os.makedirs(f"{scratch}/z/own")
open(f"{scratch}/z/own/file", "w").close()
target = os.path.normpath(f"{scratch}/{place}")
if what == "other":
    mount("none", target, b"tmpfs", 0)
    open(f"{target}/kept", "wb").write(bytes(2 << 20))
else:
    mount(beside, target, None, BIND)
use = disk.measure(scratch, [], most=1 << 40)
measured = {"small": use.size < 1 << 20, "unmeasured": use.unmeasured}
gone = folders.remove(scratch)
folders.close()
mounts = [line.split()[4] for line in open("/proc/self/mountinfo")]
left = [path for path in mounts if path.startswith(folders.path)]
inside = sorted(os.listdir(left[0])) if left else None
names = [name for _, below, _ in os.walk(folders.path) for name in below]
print(json.dumps({"gone": gone, "warned": warned, "left": left, "inside": inside, "own": "own" in names, **measured}))
"""
