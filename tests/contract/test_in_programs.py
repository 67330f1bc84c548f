"""What becomes of an executor in the programs that have one: forked, interrupted, closed by a signal handler."""

from __future__ import annotations

import os
import signal
import threading

import programs
import pytest
from observing import children, wait_until

from scaleout_mp import TaskExecutor
from scaleout_mp.executor.core import ExecutorCore
from scaleout_mp.executor.loop_thread import LoopThread


def executor_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("scaleout")]


def interrupt():
    """Do as Ctrl-C does."""
    os.kill(os.getpid(), signal.SIGINT)


async def before_the_start(start, core):
    interrupt()
    # Of the thread that waits for the start, which is to call this one off.
    await start(core)


async def after_the_start(start, core):
    await start(core)
    interrupt()


@pytest.mark.parametrize("moment", [before_the_start, after_the_start])
def test_ctrl_c_while_an_executor_starts_leaves_nothing(moment, monkeypatch):
    before, start = children(), ExecutorCore.start
    monkeypatch.setattr(ExecutorCore, "start", lambda core: moment(start, core))
    with pytest.raises(KeyboardInterrupt), TaskExecutor(echo_output=False):
        # Python may look for signals only here, once the start is over.
        wait_until(lambda: False, seconds=5)
    wait_until(lambda: not executor_threads() and children().keys() <= before.keys(), seconds=10)


def test_ctrl_c_between_the_start_and_the_block_leaves_nothing(monkeypatch):
    opened = LoopThread.open

    def open_and_interrupt(thread):
        opened(thread)
        interrupt()

    before = children()
    monkeypatch.setattr(LoopThread, "open", open_and_interrupt)
    with pytest.raises(KeyboardInterrupt), TaskExecutor(echo_output=False):
        pass
    wait_until(lambda: not executor_threads() and children().keys() <= before.keys(), seconds=10)


def test_a_signal_handler_may_shut_down_an_executor_that_starts(monkeypatch):
    executor, start = TaskExecutor(echo_output=False), ExecutorCore.start

    async def start_and_signal(core):
        await start(core)
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(ExecutorCore, "start", start_and_signal)
    told = signal.signal(signal.SIGUSR1, lambda *_: executor.shutdown())
    try:
        with pytest.raises(RuntimeError, match="shut down"), executor:
            executor.submit(programs.echo, 1)
    finally:
        signal.signal(signal.SIGUSR1, told)
    wait_until(lambda: not executor_threads(), seconds=10)


def refusal(call):
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return "none"


def test_a_fork_of_the_program_is_told_that_the_executor_is_not_its_own():
    reader, writer = os.pipe()
    with TaskExecutor(echo_output=False) as executor:
        task = executor.submit(programs.wait_for_godot)
        fork = os.fork()
        if fork == 0:
            # Where it would wait for ever: death by SIGALRM.
            signal.alarm(10)
            calls = [lambda: executor.submit(programs.echo, 1), task.result, task.report]
            os.write(writer, "\n".join(map(refusal, calls)).encode())
            executor.shutdown(abort=True)
            os._exit(7)
        os.close(writer)
        try:
            status = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
            with open(reader, encoding="utf-8") as file:
                said = file.read().split("\n")
            assert all("forked" in line for line in said), said
            assert (status, len(said)) == (7, 3)
            # The parent's goes on.
            assert executor.submit(programs.echo, 2).result(20) == 2
        finally:
            task.abort()
