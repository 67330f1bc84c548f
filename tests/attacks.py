"""What a hostile task tries; each returns what came of it. Imported in task processes by name."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import resource
import signal
import socket
import struct
import termios

_libc = ctypes.CDLL(None, use_errno=True)
#: Numbers on x86_64 and on aarch64.
_CALLS = {
    "bpf": (321, 280),
    "keyctl": (250, 219),
    "memfd_secret": (447, 447),
    "mount": (165, 40),
    "pidfd_getfd": (438, 438),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "unshare": (272, 97),
}


def system_call(name, *arguments):
    """Return the name of the error, "" for success."""
    if _libc.syscall(_CALLS[name][platform.machine() == "aarch64"], *arguments) >= 0:
        return ""
    return errno.errorcode[ctypes.get_errno()]


def forbidden_calls(supervisor):
    return {
        "ptrace": system_call("ptrace", 16, supervisor, 0, 0),
        "process_vm_readv": system_call("process_vm_readv", supervisor, None, 0, None, 0, 0),
        "unshare": system_call("unshare", 0x10000000),
        "keyctl": system_call("keyctl", 0, -3, 0),
        "mount": system_call("mount", b"none", b"/", b"tmpfs", 0, None),
        "bpf": system_call("bpf", 0, None, 0),
        "memfd_secret": system_call("memfd_secret", 0),
    }


def outcome(action, *arguments):
    try:
        action(*arguments)
    except (OSError, ValueError) as error:
        return type(error).__name__
    return ""


def reach(supervisor):
    """Try to hurt supervisor and template by number, and to lose the tag."""
    template = os.getppid()
    return {
        "kill supervisor": outcome(os.kill, supervisor, signal.SIGKILL),
        "kill template": outcome(os.kill, template, signal.SIGKILL),
        "stop template": outcome(os.kill, template, signal.SIGSTOP),
        "kill all": outcome(os.kill, -1, signal.SIGKILL),
        "kill group": outcome(os.killpg, template, signal.SIGKILL),
        "open supervisor": outcome(os.pidfd_open, supervisor),
        "starve supervisor": outcome(os.sched_setaffinity, supervisor, {0}),
        "renice supervisor": outcome(os.setpriority, os.PRIO_PROCESS, supervisor, 19),
        "limit supervisor": outcome(resource.prlimit, supervisor, resource.RLIMIT_NOFILE, (4, 4)),
        "lose the tag": outcome(resource.setrlimit, resource.RLIMIT_RTTIME, (1, 1)),
        "signal by a folder of /proc": outcome(_signal_by_folder, supervisor),
        "signal by ownership": outcome(_own_for, supervisor),
        "signal by ownership of a socket": outcome(_own_socket_for, supervisor),
        "type into a terminal": outcome(fcntl.ioctl, 0, termios.TIOCSTI, b"x"),
        "renice all of the user's": outcome(os.setpriority, os.PRIO_USER, 0, 19),
        "renice a thread": outcome(os.setpriority, os.PRIO_PROCESS, _thread_of(supervisor), 19),
        "limit a thread": outcome(resource.prlimit, _thread_of(supervisor), resource.RLIMIT_NOFILE, (4, 4)),
    }


def _thread_of(pid):
    """Return a thread of a process that is not its first, if there is one."""
    return max(int(name) for name in os.listdir(f"/proc/{pid}/task"))


def _signal_by_folder(pid):
    folder = os.open(f"/proc/{pid}", os.O_RDONLY)
    try:
        signal.pidfd_send_signal(folder, 0)
    finally:
        os.close(folder)


def _own_for(pid):
    reader, writer = os.pipe()
    try:
        fcntl.fcntl(reader, fcntl.F_SETOWN, pid)
    finally:
        os.close(reader)
        os.close(writer)


def _own_socket_for(pid):
    left, right = socket.socketpair()
    with left, right:
        fcntl.ioctl(left, 0x8901, struct.pack("=i", pid))


def reach_by_any_means(supervisor):
    """Signal, or look into, processes of whom no filter knows the number."""
    thread = _thread_of(supervisor)
    return {
        "signal a thread": outcome(os.kill, thread, 0),
        "signal the first process": outcome(os.kill, 1, 0),
        "read memory": outcome(os.open, f"/proc/{supervisor}/mem", os.O_RDONLY),
        "read a thread's memory": outcome(os.open, f"/proc/{supervisor}/task/{thread}/mem", os.O_RDONLY),
        "read the environment": outcome(_read, f"/proc/{supervisor}/environ"),
        "follow a descriptor": outcome(os.readlink, f"/proc/{supervisor}/fd/0"),
        "see where it stands": outcome(os.readlink, f"/proc/{supervisor}/cwd"),
        "enter its root": outcome(os.listdir, f"/proc/{supervisor}/root/"),
    }


def _read(path):
    with open(path, "rb") as file:
        return file.read()


def poison():
    """Try to change what later tasks are forked from; return what this task shares with its template, too."""
    template = os.getppid()
    shared, own = given_by_the_fork()
    attempts = {
        "write its memory": outcome(os.open, f"/proc/{template}/mem", os.O_RDWR),
        "read its environment": outcome(_read, f"/proc/{template}/environ"),
        "see its memory map": outcome(_read, f"/proc/{template}/maps"),
        "follow its descriptors": outcome(os.readlink, f"/proc/{template}/fd/0"),
        "open its descriptors": outcome(os.open, f"/proc/{template}/fd/1", os.O_WRONLY),
        "take its descriptors": system_call("pidfd_getfd", -1, 0, 0),
        "debug it": system_call("ptrace", 16, template, 0, 0),
        "write into it": system_call("process_vm_writev", template, None, 0, None, 0, 0),
        "kill it": outcome(os.kill, template, signal.SIGKILL),
        "stop it": outcome(os.kill, template, signal.SIGSTOP),
        "spare its life for last": outcome(process_file, template, "oom_score_adj", b"1000"),
        "slow it down": outcome(os.setpriority, os.PRIO_PROCESS, template, 19),
        "bind it": outcome(os.sched_setaffinity, template, {0}),
    }
    return attempts, shared, own


def given_by_the_fork():
    """Return the writable shared mappings and the descriptors of this task."""
    with open("/proc/self/maps") as file:
        shared = [line for line in file if line.split()[1].startswith("rw") and line.split()[1][3] == "s"]
    return shared, sorted(int(name) for name in os.listdir("/proc/self/fd"))


def process_file(pid, name, data):
    with open(f"/proc/{pid}/{name}", "wb", buffering=0) as file:
        file.write(data)


def ordinary_work():
    """What training code does and a filter must leave alone."""
    import multiprocessing
    import subprocess
    import tempfile
    import threading

    done = []
    done.append(subprocess.run(["echo", "x"], capture_output=True, check=True).stdout == b"x\n")
    sleeper = subprocess.Popen(["sleep", "100"])
    sleeper.terminate()
    done.append(sleeper.wait() == -signal.SIGTERM)
    thread = threading.Thread(target=done.append, args=(True,))
    thread.start()
    thread.join()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        done.append(pool.map(abs, [-1, -2]) == [1, 2])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        done.append(pool.map(abs, [-3]) == [3])
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"x")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    done.append(resource.getrlimit(resource.RLIMIT_RTTIME)[1] != resource.RLIM_INFINITY)
    os.sched_setaffinity(0, os.sched_getaffinity(0))
    return done


def fit_line():
    """Least squares by numpy, on as many threads as its library likes."""
    import numpy as np

    random = np.random.default_rng(0)
    inputs = random.normal(size=(2000, 300))
    wanted = random.normal(size=300)
    found = np.linalg.lstsq(inputs, inputs @ wanted, rcond=None)[0]
    return float(np.abs(found - wanted).max())


def fit_in_processes():
    """joblib on multiprocessing, with an array in shared memory."""
    import joblib
    import numpy as np

    array = np.arange(500_000, dtype=np.float64)
    with joblib.parallel_backend("multiprocessing", n_jobs=2):
        return joblib.Parallel(max_nbytes=1000)(joblib.delayed(_sum)(array, part) for part in range(4))


def _sum(array, part):
    return float(array[part::4].sum())


def fit_forest():
    """scikit-learn on joblib's process pool."""
    import joblib
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.ensemble import RandomForestClassifier

    digits = load_digits()
    with joblib.parallel_backend("loky", n_jobs=2):
        forest = RandomForestClassifier(n_estimators=20, random_state=0).fit(digits.data, digits.target)
        squares = joblib.Parallel(n_jobs=2)(joblib.delayed(pow)(number, 2) for number in range(5))
    return float(np.mean(forest.predict(digits.data) == digits.target)), squares


def privileges():
    with open("/proc/self/status") as file:
        fields = dict(line.rstrip("\n").split(":", 1) for line in file)
    return {name: fields[name].strip() for name in ("NoNewPrivs", "Seccomp")}
