"""Process tree: children that try to outlive their task."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

from fault_catalogue import abort_when_ready, fault, say_ready

from scaleout_mp import EndReason, Limits

COMPLETED, ABORTED, PIDS = EndReason.COMPLETED, EndReason.INTERRUPTED_BY_CLIENT, EndReason.PIDS
ONE_LEFT = "1 process that it left behind had to be killed"
SOME_LEFT = "left behind had to be killed"
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 4, 15, 36


def _prctl(option, value):
    assert ctypes.CDLL(None).prctl(option, value, 0, 0, 0) == 0


def _sleep():
    while True:
        time.sleep(1_000)


def _leave(*actions, daemon=True):
    """Fork a child that does `actions`; return when it has come through them to its last one, which hangs."""
    *before, last = actions
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        if daemon:
            os.setsid()
            if os.fork():
                os._exit(0)
        for action in before:
            action()
        os.write(writer, b"x")
        last()
        os._exit(0)
    if daemon:
        os.waitpid(pid, 0)
    assert os.read(reader, 1) == b"x"
    os.close(reader)
    os.close(writer)
    return pid


@fault(COMPLETED, returns="done", note=ONE_LEFT)
def child_in_its_own_session(_):
    _leave(os.setsid, _sleep, daemon=False)
    return "done"


@fault(COMPLETED, returns="done", note=ONE_LEFT)
def daemon(_):
    _leave(_sleep)
    return "done"


@fault(COMPLETED, returns="done", note=ONE_LEFT)
def daemon_that_ignores_every_signal(_):
    def ignore():
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)

    _leave(ignore, _sleep)
    return "done"


@fault(COMPLETED, returns="done", note=ONE_LEFT)
def daemon_with_every_signal_blocked(_):
    _leave(lambda: signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()), _sleep)
    return "done"


@fault(COMPLETED, returns="done", note=ONE_LEFT)
def stopped_daemon(_):
    _leave(lambda: os.kill(os.getpid(), signal.SIGSTOP))
    return "done"


@fault(COMPLETED, returns="done", note=ONE_LEFT)
def daemon_that_hides_its_name_and_memory(_):
    _leave(lambda: _prctl(_PR_SET_NAME, ctypes.c_char_p(b"kworker/0:1")), lambda: _prctl(_PR_SET_DUMPABLE, 0), _sleep)
    return "done"


@fault(COMPLETED, returns="done", note=SOME_LEFT)
def daemon_that_adopts_orphans(_):
    def family():
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        for _ in range(3):
            _leave(_sleep)

    _leave(family, _sleep)
    return "done"


@fault(COMPLETED, returns="done", note=ONE_LEFT)
def program_with_an_empty_environment(_):
    pid = os.posix_spawn("/bin/sleep", ["sleep", "1000"], {}, setsid=True)
    assert pid
    return "done"


@fault(COMPLETED, returns="done", note=ONE_LEFT)
def program_started_by_vfork(_):
    subprocess.Popen(["sleep", "1000"], start_new_session=True, stdout=subprocess.DEVNULL).returncode = 0
    return "done"


@fault(COMPLETED, returns="done", note=ONE_LEFT)
def daemon_that_holds_the_output_pipe(_):
    print("last words", flush=True)
    _leave(_sleep)
    return "done"


@fault(COMPLETED, returns="done", note=SOME_LEFT)
def daemon_that_prints_for_ever(_):
    def shout():
        while True:
            os.write(1, b"x" * 4096)

    _leave(shout)
    return "done"


@fault(COMPLETED, returns="done", note=SOME_LEFT)
def fifty_children(_):
    for _ in range(50):
        _leave(_sleep, daemon=False)
    return "done"


def _fork_chain():
    """Fork and leave, so that nobody with this pid is there when the signal comes."""
    while True:
        if os.fork():
            os._exit(0)


@fault(COMPLETED, returns="done", note=SOME_LEFT)
def fork_as_fast_as_killed(_):
    for _ in range(3):
        _leave(_fork_chain)
    return "done"


@fault(COMPLETED, returns="done", note=SOME_LEFT)
def small_programs_that_fork_and_leave(_):
    # Quicker than any search: a shell has little to copy.
    chain = "f() { f & exit; }; f"
    for _ in range(4):
        subprocess.Popen(["sh", "-c", chain], start_new_session=True).wait()
    return "done"


def _replace_children():
    """Have a child at all times, whoever kills it."""
    while True:
        pid = os.fork()
        if pid == 0:
            _sleep()
        os.waitpid(pid, 0)


@fault(COMPLETED, returns="done", note=SOME_LEFT)
def children_that_are_replaced_as_they_die(_):
    for _ in range(5):
        _leave(_replace_children)
    return "done"


@fault(PIDS, limits=Limits(pids=50, abort_grace=0.3))
def fork_bomb(_):
    # Seven generations: enough to pass the limit, and bounded should it fail.
    for _ in range(7):
        os.fork()
    _sleep()


@fault(PIDS, limits=Limits(pids=50, threads=1, abort_grace=0.3))
def thread_bomb(_):
    for _ in range(200):
        threading.Thread(target=time.sleep, args=(1_000,), daemon=True).start()
    _sleep()


@fault(COMPLETED, returns="done")
def children_that_nobody_reaps(_):
    for _ in range(200):
        if os.fork() == 0:
            os._exit(0)
    return "done"


@fault(EndReason.CRASHED, signal="SIGKILL")
def dead_task_with_a_daemon(_):
    _leave(_sleep)
    os.kill(os.getpid(), signal.SIGKILL)


@fault(EndReason.CRASHED, signal="SIGSEGV")
def crash_in_the_middle_of_children(_):
    for _ in range(10):
        _leave(_sleep, daemon=False)
    ctypes.string_at(0)


@fault(COMPLETED, returns="parent")
def fork_that_comes_back_as_well(_):
    return "child" if os.fork() == 0 else "parent"


@fault(COMPLETED, returns="parent")
def fork_that_crashes(_):
    if os.fork() == 0:
        ctypes.string_at(0)
    os.wait()
    return "parent"


@fault(ABORTED, drive=abort_when_ready)
def stopped_grandchildren(_):
    for _ in range(3):
        _leave(lambda: os.kill(os.getpid(), signal.SIGSTOP))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say_ready()
    _sleep()


@fault(ABORTED, drive=abort_when_ready)
def interpreters_below_interpreters(_):
    script = "print('ready', flush=True)\nimport time; time.sleep(1000)"
    for _ in range(3):
        script = (
            f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-ISc', {script!r}])\ntime.sleep(999)"
        )
    child = subprocess.Popen([sys.executable, "-ISc", script], stdout=subprocess.PIPE, start_new_session=True)
    child.stdout.readline()
    say_ready()
    child.wait()
