"""Hang and abort: tasks that do not stop when they are asked, or not at once, or in an odd moment."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import subprocess
import threading
import time

import numpy as np
from fault_catalogue import abort_when_ready, fault, say_ready

from scaleout_mp import EndReason, Limits, StoppedException, current_task

ABORTED, WALL_TIME = EndReason.INTERRUPTED_BY_CLIENT, EndReason.WALL_TIME
WALL = Limits(wall_time=0.2, abort_grace=0.2)


def _every_signal(action):
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, action)


@fault(WALL_TIME, limits=WALL, says="killed with SIGKILL")
def hold_the_interpreter(_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        # A signal ends the call, whatever its handler does.
        ctypes.PyDLL(None).sleep(1_000)


@fault(WALL_TIME, limits=WALL, says="it ended on SIGTERM", stacks="in spin")
def spin(_):
    while True:
        pass


@fault(ABORTED, drive=abort_when_ready, says="killed with SIGKILL", stacks="in ignore_sigterm")
def ignore_sigterm(_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say_ready()
    while True:
        time.sleep(1_000)


@fault(ABORTED, drive=abort_when_ready, says="killed with SIGKILL")
def ignore_every_signal(_):
    _every_signal(signal.SIG_IGN)
    say_ready()
    while True:
        time.sleep(1_000)


@fault(ABORTED, drive=abort_when_ready, says="killed with SIGKILL")
def block_every_signal(_):
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    say_ready()
    while True:
        ctypes.CDLL(None).sleep(1_000)


@fault(ABORTED, drive=abort_when_ready, says="killed with SIGKILL")
def stop_itself(_):
    say_ready()
    while True:
        os.kill(os.getpid(), signal.SIGSTOP)


@fault(ABORTED, drive=abort_when_ready, says="killed with SIGKILL")
def swallow_the_abort(_):
    signal.signal(signal.SIGTERM, lambda *_: None)
    say_ready()
    while True:
        try:
            while True:
                current_task().check_abort()
                time.sleep(0.005)
        except StoppedException:
            continue


@fault(ABORTED, drive=abort_when_ready, says="enough")
def raise_something_else_on_abort(_):
    say_ready()
    try:
        while True:
            current_task().check_abort()
            time.sleep(0.005)
    except StoppedException as stop:
        raise ValueError("I did not want to stop") from stop


@fault(ABORTED, drive=abort_when_ready)
def return_on_abort(_):
    say_ready()
    try:
        while True:
            current_task().check_abort()
            time.sleep(0.005)
    except StoppedException:
        return "too late"


@fault(ABORTED, drive=abort_when_ready, says="killed with SIGKILL")
def raise_in_the_signal_handler(_):
    def refuse(*_):
        raise InterruptedError

    signal.signal(signal.SIGTERM, refuse)
    say_ready()
    while True:
        try:
            time.sleep(1_000)
        except InterruptedError:
            continue


@fault(ABORTED, drive=abort_when_ready, says="killed with SIGKILL")
def fork_in_the_signal_handler(_):
    signal.signal(signal.SIGTERM, lambda *_: os.fork())
    say_ready()
    while True:
        time.sleep(1_000)


@fault(ABORTED, drive=abort_when_ready)
def hang_in_an_exit_handler_on_abort(_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    atexit.register(time.sleep, 1_000)
    say_ready()
    while True:
        current_task().check_abort()
        time.sleep(0.005)


@fault(ABORTED, drive=abort_when_ready, stacks="in wait_for_oneself")
def wait_for_oneself(_):
    lock = threading.Lock()
    lock.acquire()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say_ready()
    lock.acquire()


@fault(ABORTED, drive=abort_when_ready)
def wait_for_a_child_that_ignores_all(_):
    script = "trap '' TERM INT HUP; echo ready; while :; do sleep 1000; done"
    child = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE)
    child.stdout.readline()
    say_ready()
    child.wait()


def _abort_at_once(task, _):
    task.abort("enough")


@fault(ABORTED, drive=_abort_at_once, says="enough")
def aborted_before_it_runs(_):
    time.sleep(1_000)


@fault(ABORTED, drive=abort_when_ready)
def aborted_while_records_pour(_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say_ready()
    context = current_task()
    while True:
        try:
            context.log_metric({"x": 1.0})
        except StoppedException:
            continue


def _abort_late(task, _):
    # Somewhere between the first byte of the result and the last of the checks.
    next(task.records())
    time.sleep(0.03)
    task.abort("enough")


@fault(ABORTED, drive=_abort_late, peak=300 << 20)
def aborted_while_its_result_is_sent(_):
    value = np.zeros(20 << 20)
    say_ready()
    while not _aborted():
        pass
    return value


def _aborted():
    try:
        current_task().check_abort()
    except StoppedException:
        return True
    return False


class _Sticky:
    def __del__(self):
        time.sleep(1_000)


@fault(WALL_TIME, limits=WALL)
def hang_in_a_finaliser(_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _Sticky()


@fault(EndReason.NO_PROGRESS, limits=Limits(no_progress=0.2, abort_grace=0.2), stacks="in fall_silent")
def fall_silent(_):
    say_ready()
    threading.Event().wait()


@fault(EndReason.NO_PROGRESS, limits=Limits(no_progress=0.3, abort_grace=0.2), says="killed with SIGKILL")
def fall_silent_with_signals_blocked(_):
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    ctypes.CDLL(None).sleep(1_000)


@fault(WALL_TIME, limits=WALL)
def become_a_sleeping_program(_):
    os.execvp("sleep", ["sleep", "1000"])
