"""Programs in which the kernel refuses every descriptor that is sent. Each runs in a process of its own."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import resource
import socket
import threading
import time

import pytest
from observing import wait_until

from scaleout_mp import EndReason, Limits, TaskExecutor
from scaleout_mp.errors import ChannelError
from scaleout_mp.ipc import frames, outgoing
from scaleout_mp.ipc.channel import TRY_EVERY, ChildChannel, channel_pair, close_all
from scaleout_mp.ipc.frames import Kind
from scaleout_mp.ipc.loop_channel import SupervisorChannel
from scaleout_mp.sandbox import capabilities
from scaleout_mp.task import TaskState

#: Descriptors that this process may have: those of other processes are not refused.
_MOST = 200


def few_descriptors(hard=_MOST):
    """Have few open files, and no privilege to have more under way."""
    capabilities.keep(capabilities.OF_TRAINING)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MOST, hard))


@contextlib.contextmanager
def too_many_in_flight(hard=_MOST):
    """Have more descriptors under way than this process may have, so that it cannot send another."""
    few_descriptors(hard)
    parked = park(_MOST + 1)
    with contextlib.closing(parked[0]), contextlib.closing(parked[1]):
        yield parked


def park(count):
    """Send that many descriptors to nobody, and return both ends."""
    ends = socket.socketpair()
    # No socket: of those that are sent through themselves the kernel takes its time to get rid.
    with open(os.devnull) as file:
        for size in [100] * (count // 100) + [count % 100]:
            rights = array.array("i", [file.fileno()] * size)
            wait_until(lambda rights=rights: _sent(ends[0], rights), what="no other process has as many under way")
    return ends


def _sent(end, rights):
    try:
        end.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    except OSError as error:
        if error.errno != errno.ETOOMANYREFS:
            raise
        return False
    return True


def release(ends):
    """Drop what is under way."""
    for end in ends:
        end.close()


def record_meanwhile():
    """A task's records go on, and a descriptor goes as soon as there is room."""
    ours, theirs = channel_pair()
    child, other = ChildChannel(theirs), ChildChannel(ours)
    with too_many_in_flight() as parked:
        for number in range(20):
            child.record(Kind.LOG, number)
        assert [other.receive().fields for _ in range(20)] == [[number] for number in range(20)]
        with pytest.raises(ChannelError, match="too many descriptors under way"):
            child.send(frames.encode(Kind.RESULT, descriptors=1), [0], try_for=0)
        timer = threading.Timer(0.2, release, [parked])
        timer.start()
        child.send(frames.encode(Kind.RESULT, descriptors=1), [0])
        frame = other.receive()
        assert len(frame.descriptors) == 1
        os.close(frame.descriptors[0])
        timer.join()


def start_meanwhile():
    """What the supervisor sends waits, is withdrawn by its name, and arrives when there is room."""
    asyncio.run(_start_meanwhile())


async def _start_meanwhile():
    ours, theirs = channel_pair()
    child = ChildChannel(theirs)
    supervisor = SupervisorChannel(ours, on_frame=lambda _: None, on_closed=lambda _: None)
    refused = []

    def send(name):
        with open(os.devnull) as file:
            frame = frames.encode(Kind.START, name, descriptors=1)
            supervisor.send(
                frame, [file.fileno()], name=name, on_refused=lambda problem: refused.append((name, problem))
            )

    before = sorted(os.listdir("/proc/self/fd"))
    with too_many_in_flight() as parked, collected_warnings() as warned:
        for name in ("first", "second", "third"):
            send(name)
        supervisor.send(frames.encode(Kind.ABORT, "last"))
        assert supervisor.withdraw("second")
        assert not supervisor.withdraw("nobody")
        assert [name for name, _ in refused] == ["second"]
        assert "too many descriptors under way" in refused[0][1]
        # Tried again, several times.
        await asyncio.sleep(4 * TRY_EVERY)
        assert not child.waitreadable(0)
        release(parked)
        received = [await asyncio.to_thread(child.receive) for _ in range(3)]
        assert [frame.fields[0] for frame in received] == ["first", "third", "last"]
        for frame in received[:2]:
            close_all(frame.descriptors)
        assert sorted(os.listdir("/proc/self/fd")) == before
        assert len(warned) == 1
        assert len(refused) == 1
        await _give_up(send, refused)
    supervisor.close()
    child.close()


def start_all_the_same():
    """A supervisor that could have more open files than its tasks is not held up, and its limit stays as it is."""
    asyncio.run(_start_all_the_same())


async def _start_all_the_same():
    ours, theirs = channel_pair()
    child = ChildChannel(theirs)
    supervisor = SupervisorChannel(ours, on_frame=lambda _: None, on_closed=lambda _: None)
    with too_many_in_flight(hard=2 * _MOST):
        with pytest.raises(ChannelError, match="too many descriptors under way"):
            child.send(frames.encode(Kind.RESULT, descriptors=1), [0], try_for=0)
        supervisor.send(frames.encode(Kind.START, descriptors=1), [0])
        assert child.waitreadable(0)
        close_all(child.receive().descriptors)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (_MOST, 2 * _MOST)
    supervisor.close()
    child.close()


def run_tasks_meanwhile():
    """Starts are reported with the reason, taken back when they are aborted, and cost the other tasks nothing."""
    outgoing.TRY_FOR = 1.5
    few_descriptors()
    with TaskExecutor(echo_output=False, limits=Limits(abort_grace=0)) as executor:
        template = executor.submit(os.getppid).result(20)
        running = executor.submit(time.sleep, 100)
        wait_until(lambda: running.state is TaskState.RUNNING, what="the task runs")
        parked = park(_MOST + 1)
        report = executor.submit(os.getppid).report(20)
        assert report.reason is EndReason.REFUSED, report.explain()
        assert "cannot start a process: processes of this user have too many descriptors" in report.message
        aborted = executor.submit(os.getppid)
        wait_until(lambda: aborted.state is TaskState.STARTING, what="the task starts")
        aborted.abort()
        assert aborted.report(20).reason is EndReason.INTERRUPTED_BY_CLIENT
        waits = executor.submit(os.getppid)
        wait_until(lambda: waits.state is TaskState.STARTING, what="the task starts")
        release(parked)
        assert waits.result(20) == template
        assert running.state is TaskState.RUNNING
        running.abort()
        running.report(20)


async def _give_up(send, refused):
    """In the end the kernel's refusal is told to who sent the frame."""
    outgoing.TRY_FOR = 0.2
    parked = park(_MOST + 1)
    send("late")
    async with asyncio.timeout(10):
        while len(refused) < 2:  # noqa: ASYNC110 - nothing there could set an event
            await asyncio.sleep(0.01)
    assert refused[1][0] == "late"
    release(parked)


@contextlib.contextmanager
def collected_warnings():
    warned = []
    handler = logging.Handler()
    handler.emit = warned.append
    logging.getLogger("scaleout_mp").addHandler(handler)
    yield warned
    logging.getLogger("scaleout_mp").removeHandler(handler)


if __name__ == "__main__":
    import sys

    with open(__file__) as lock:
        # The count is one for all processes of a user.
        fcntl.flock(lock, fcntl.LOCK_EX)
        globals()[sys.argv[1]]()
