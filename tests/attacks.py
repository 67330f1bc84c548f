"""What a hostile task tries; each returns what came of it. Imported in task processes by name."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal

_libc = ctypes.CDLL(None, use_errno=True)
_CALLS = {
    "x86_64": {"ptrace": 101, "process_vm_readv": 310, "unshare": 272, "keyctl": 250, "mount": 165, "bpf": 321},
    "aarch64": {"ptrace": 117, "process_vm_readv": 270, "unshare": 97, "keyctl": 219, "mount": 40, "bpf": 280},
}


def system_call(name, *arguments):
    """Return the name of the error, "" for success."""
    if _libc.syscall(_CALLS[platform.machine()][name], *arguments) >= 0:
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
    }


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
