"""What tests run in task processes. Imported there by name, so it imports little itself."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

import numpy as np

from scaleout_mp import ScaleoutModel, StoppedException, current_task


def echo(value):
    return value


def add_one(model, settings):
    task = current_task()
    for step in range(settings["epochs"]):
        task.log_metric({"loss": 1.0 / (step + 1)}, step=step)
    weights = [array + 1 for array in model.get_training_model()]
    return ScaleoutModel.from_training_model(weights), {"training_metadata": {"num_examples": 7}}


def describe_process():
    """What the process around a task looks like."""
    descriptors = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptors[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
    return {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "session": os.getsid(0),
        "modules": sorted(sys.modules),
        "descriptors": descriptors,
        "threads": len(os.listdir("/proc/self/task")),
        "sigterm": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
        "argv0": sys.argv[0],
    }


def raise_error():
    raise ValueError("the learning rate is negative")


def raise_base_exception():
    raise BaseException("out of everything")  # noqa: TRY002 - the very base is the point


def system_exit():
    sys.exit(3)


def exit_zero():
    os._exit(0)


def kill_self():
    current_task().log_metric({"last": 1.0}, step=41)
    os.kill(os.getpid(), signal.SIGKILL)


def segfault():
    print("about to crash")
    ctypes.string_at(0)


def hold_gil():
    """Stay in C code for ever without letting go of the interpreter lock."""
    while True:
        # A signal ends the call, whatever its handler does.
        ctypes.PyDLL(None).sleep(1_000)


def spin():
    while True:
        pass


def sleep_in_c():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        ctypes.CDLL(None).sleep(1_000)


def hang_with_family(path):
    """Ignore everything, with a child in a session of its own and a daemon; write their pids to `path`."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    pids = [os.getpid()]
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        os.write(writer, b"%d\n" % os.getpid())
        while True:
            time.sleep(100)
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.write(writer, b"%d\n" % os.getpid())
        while True:
            time.sleep(100)
    data = b""
    while data.count(b"\n") < 2:
        data += os.read(reader, 100)
    pids += [int(line) for line in data.split()]
    with open(path + ".tmp", "w") as file:
        file.write(" ".join(map(str, pids)))
    os.rename(path + ".tmp", path)
    current_task().log_metric({"ready": 1.0})
    while True:
        try:
            time.sleep(100)
        except BaseException:
            continue


def leave_daemon(path):
    """Return a result, and leave a daemon behind."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.write(writer, b"%d" % os.getpid())
        time.sleep(1_000)
    with open(path, "wb") as file:
        file.write(os.read(reader, 100))
    return "done"


def allocate(mib_per_second=None):
    held = []
    while True:
        held.append(np.ones(1 << 17))
        if mib_per_second:
            time.sleep(1 / mib_per_second)


def allocate_in_children():
    """Three processes whose memory only together passes the limit."""
    for _ in range(3):
        if os.fork() == 0:
            held = np.ones(10 << 20)
            time.sleep(1_000)
            del held
    time.sleep(1_000)


def memory_error():
    np.empty(1 << 50, np.uint8)


def stop_when_asked():
    task = current_task()
    task.log_metric({"ready": 1.0})
    try:
        while True:
            task.check_abort()
            time.sleep(0.005)
    except StoppedException as stop:
        task.log_metric({"cleaned up": 1.0})
        raise StoppedException(f"stopped: {stop}") from stop


def return_while_stopping():
    task = current_task()
    task.log_metric({"ready": 1.0})
    try:
        while True:
            task.check_abort()
            time.sleep(0.005)
    except StoppedException:
        return "too late"


def save_on_sigterm(path):
    def save(*_):
        with open(path, "w") as file:
            file.write("saved")
        os._exit(0)

    signal.signal(signal.SIGTERM, save)
    current_task().log_metric({"ready": 1.0})
    while True:
        time.sleep(100)


def linger():
    """Return, with a thread that never ends."""
    threading.Thread(target=time.sleep, args=(1_000,)).start()
    return "in time"


def crash_at_exit():
    import atexit

    atexit.register(lambda: ctypes.string_at(0))
    return "safe"


def return_object():
    return object()


def log_many(count):
    task = current_task()
    for step in range(count):
        task.log_metric({"x": float(step)}, step=step)
    os.kill(os.getpid(), signal.SIGKILL)


def print_much(lines):
    for line in range(lines):
        print(f"line {line} of standard output")
    print("an error", file=sys.stderr)


def write_raw(data):
    """Write bytes into the control channel, as a hostile task would, and wait for what comes of it."""
    os.write(3, data)
    time.sleep(1_000)


def numpy_random():
    return float(np.random.random())  # noqa: NPY002 - the global generator is what is tested


def mutate(array):
    array += 1
    return array


def fork_and_log():
    """Log from a process that the task forked."""
    pid = os.fork()
    if pid == 0:
        os._exit(0 if current_task() is None else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def burn_processor():
    while True:
        sum(range(1_000_000))


def burn_in_children():
    for _ in range(3):
        if os.fork() == 0:
            burn_processor()
    time.sleep(1_000)


def fork_many(count):
    for _ in range(count):
        if os.fork() == 0:
            time.sleep(1_000)
    time.sleep(1_000)


def write_file(path, size):
    with open(path, "wb", buffering=0) as file:
        written = 0
        while written < size:
            written += file.write(bytes(min(65536, size - written)))
    return written


def open_files(count):
    return len([os.open("/dev/null", os.O_RDONLY) for _ in range(count)])


def silent_after_one_metric():
    current_task().log_metric({"ready": 1.0})
    wait_for_godot()


def wait_for_godot():
    while True:
        time.sleep(0.01)


def look_busy(seconds):
    task = current_task()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        task.check_abort()
        time.sleep(0.01)
    return "busy"


def blas_threads():
    """What the library says, after a product that is worth threads."""
    import threadpoolctl

    matrix = np.ones((600, 600))
    matrix @ matrix
    counts = {pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["internal_api"] == "openblas"}
    return sorted(counts), os.environ["OMP_NUM_THREADS"]


def fork_return():
    return "child" if os.fork() == 0 else "parent"


def fork_exit():
    if os.fork() == 0:
        sys.exit(0)
    os.wait()
    return "parent"


def fork_raise():
    if os.fork() == 0:
        raise ValueError("in the child")
    os.wait()
    return "parent"


def deep_tuple(depth):
    value = ()
    for _ in range(depth):
        value = (value,)
    return value


def log_metric(step, key):
    current_task().log_metric({key: 1.0}, step=step)


def log_many_keys(count):
    current_task().log_metric({f"key {number}": 1.0 for number in range(count)})


def idle_threads(count):
    done = threading.Event()
    threads = [threading.Thread(target=done.wait) for _ in range(count)]
    for thread in threads:
        thread.start()
    done.set()
    return len(threads)


def executor_inside(path):
    from scaleout_mp import TaskExecutor

    with TaskExecutor(echo_output=False) as inner:
        if path is not None:
            inner.submit(hang_with_family, path).result()
        return inner.submit(echo, 3).result()


def log_much_and_die(count):
    """Log metrics, and with them attributes and lines of the log; then be gone, without a word."""
    task = current_task()
    for step in range(count):
        task.log_metric({"loss": 1.0}, step=step)
        if step % 100 == 0:
            task.log_attributes({"step": str(step)})
            task.log_telemetry({"step": float(step)})
    os.kill(os.getpid(), signal.SIGKILL)


class TakesSignals:
    """A callable whose loading does what an asyncio loop with a signal handler does, and more."""

    def __reduce__(self):
        return take_signals, ()

    def __call__(self):
        return "ran"


def take_signals():
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    return TakesSignals()


def raise_for_a_child_that_is_too_large():
    """Have a child take more than the limit, and raise as soon as that has died of it."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        allocate()
    raise RuntimeError(f"the child ended with {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}")


def memory_error_in_a_group():
    """Do as asyncio.TaskGroup does with what its tasks raise."""
    raise ExceptionGroup("tasks", [ValueError(), ExceptionGroup("more", [MemoryError()])])


def memory_error_as_a_cause():
    """Raise an error of one's own for it, as libraries do."""
    try:
        bytearray(1 << 50)
    except MemoryError as error:
        raise ValueError("cannot load the data") from error


def memory_error_that_is_got_over():
    """Go on with less, and fail for another reason."""
    try:
        bytearray(1 << 50)
    except MemoryError:
        raise ValueError("no data") from None
