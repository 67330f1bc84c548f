"""What tests run in workers. Imported there by name, so it imports little itself."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time

import numpy as np

from scaleout_mp import StoppedException, current_task

#: Of the worker that has imported this module.
seen = []


class Counter:
    """A callable that keeps a count, as users' callbacks keep models and optimisers."""

    def __init__(self):
        self.count = 0

    def __call__(self, *_):
        self.count += 1
        return self.count, os.getpid()


def remember(value):
    seen.append(value)
    return list(seen), os.getpid()


def pid(*_):
    return os.getpid()


def speak(text, step):
    print(f"{text} on standard output")
    sys.stderr.write(f"{text} on standard error\n")
    os.write(1, f"{text}, raw\n".encode())
    current_task().log_metric({text: 1.0}, step=step)
    return text


def burn(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until:
        sum(range(1000))
    return os.getpid()


def stop_when_asked():
    task = current_task()
    task.log_metric({"ready": 1.0})
    while True:
        task.check_abort()
        time.sleep(0.002)


def swallow_the_stop():
    try:
        stop_when_asked()
    except StoppedException:
        return "stopped"


def hang(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    current_task().log_metric({"ready": 1.0})
    while True:
        time.sleep(100)


def look_once(_):
    current_task().check_abort()
    return os.getpid()


def leave_a_thread(path):
    """Return, with a thread that goes on logging under two names, and says how that went."""
    own = current_task()

    def log():
        lines = []
        for kind in ("old", "new"):
            while True:
                try:
                    (own if kind == "old" else current_task()).log_metric({"stray": 1.0})
                except StoppedException as stop:
                    lines.append(f"{kind}: {stop}")
                    break
        with open(path + ".tmp", "w") as file:
            file.write("\n".join(lines))
        os.rename(path + ".tmp", path)

    threading.Thread(target=log, daemon=True).start()
    return os.getpid()


def leave_a_child():
    child = os.fork()
    if child == 0:
        time.sleep(1_000)
        os._exit(0)
    return child


def fork_and_return():
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    return os.getpid()


def mark_exit(path):
    atexit.register(lambda: open(path, "w").close())
    return os.getpid()


def meet(folder, name, others):
    """Wait until tasks of these names are at work as well."""
    open(os.path.join(folder, name), "w").close()
    until = time.monotonic() + 20
    while not all(os.path.exists(os.path.join(folder, other)) for other in others):
        if time.monotonic() > until:
            raise TimeoutError
        time.sleep(0.005)
    return os.getpid()


def set_up(value, path=None):
    if path is not None:
        with open(path, "a") as file:
            file.write(f"{os.getpid()}\n")
    seen.append(np.sum(value))


def use_set_up():
    return float(seen[0]), len(seen), os.getpid()


def fail_to_set_up():
    raise RuntimeError("no weights here")


def speak_out_of_turn(data):
    """Return, and send bytes once the task is over."""

    def send():
        time.sleep(0.1)
        os.write(3, data)

    threading.Thread(target=send, daemon=True).start()
    return os.getpid()


def hold(megabytes):
    """Keep memory from task to task."""
    seen.append(np.ones(megabytes << 17))
    return os.getpid()


def own_copy(array):
    array += 1
    return array


class Unreadable:
    """Pickles, and cannot be unpickled."""

    def __reduce__(self):
        return refuse, ()


def refuse():
    raise RuntimeError("not this time")


def count_in_state(*, then=None):
    """Count calls in the state; then leave in some bad way."""
    state = current_task().state
    state["count"] = state.get("count", 0) + 1
    if then == "raise":
        raise ValueError("after all")
    if then == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if then == "hang":
        hang()
    return state["count"], os.getpid()


def put_in_state(key, value):
    current_task().state[key] = value
    return os.getpid()


def lock_in_state():
    current_task().state["lock"] = threading.Lock()


class CallsWhenRead:
    """Unpickled by a call of any function."""

    def __init__(self, function, argument):
        self._called = function, (argument,)

    def __reduce__(self):
        return self._called


def exit_when_read():
    current_task().state["bad"] = CallsWhenRead(os._exit, 3)


def sleep_when_read():
    current_task().state["bad"] = CallsWhenRead(time.sleep, 100)


def unreadable_in_state():
    current_task().state["bad"] = Unreadable()


def sum_of_state(key):
    return float(np.sum(current_task().state[key]))


def keys_of_state():
    return sorted(current_task().state)


def never_look_at_state():
    raise ValueError("never looked")


def send_state(data, *, unsealed=False):
    """Send a STATE frame as a hostile task would."""
    if unsealed:
        memory = os.memfd_create("unsealed")
        os.write(memory, bytes(64))
        import array
        import socket

        with socket.socket(fileno=os.dup(3)) as sock:
            sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [memory]))])
    else:
        os.write(3, data)
    time.sleep(1_000)


def surroundings():
    """What this process has of the machine."""
    return {
        "gpus": {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")},
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "affinity": sorted(os.sched_getaffinity(0)),
        "threads": os.environ["OMP_NUM_THREADS"],
        "pid": os.getpid(),
    }
