"""The supervisor's end of a task's channel against what a task may do to hold it up."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import struct
import threading
import time

import pytest
from observing import open_descriptors, wait_until

from scaleout_mp.errors import ProtocolViolation
from scaleout_mp.ipc import frames, messages
from scaleout_mp.ipc.channel import ChildChannel, channel_pair, close_all
from scaleout_mp.ipc.frames import Frame, Kind
from scaleout_mp.ipc.loop_channel import SupervisorChannel
from scaleout_mp.ipc.ring import CAPACITY

#: Seconds for which a loop may be held up by one task.
LATE = 0.5


@pytest.fixture(autouse=True)
def same_descriptors():
    before = open_descriptors()
    yield
    # Others may close theirs meanwhile.
    wait_until(lambda: not open_descriptors().keys() - before.keys(), seconds=10, what=f"none beside {before}")


@contextlib.contextmanager
def ends(on_frame=lambda frame: None):
    closed = []
    ours, theirs = channel_pair()
    supervisor = SupervisorChannel(ours, on_frame=on_frame, on_closed=closed.append)
    child = ChildChannel(theirs)
    yield supervisor, child, closed
    supervisor.close()
    child.close()


def send(sock, data, descriptors):
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))])


async def poll(closed):
    """Let the loop turn until the channel is closed."""
    async with asyncio.timeout(10):
        while not closed:  # noqa: ASYNC110 - nothing there could set an event
            await asyncio.sleep(0.001)


async def lateness(seconds):
    """Return by how much the loop was late at its latest."""
    loop = asyncio.get_running_loop()
    end, worst = loop.time() + seconds, 0.0
    while (before := loop.time()) < end:
        await asyncio.sleep(0.01)
        worst = max(worst, loop.time() - before - 0.01)
    return worst


def test_a_ring_that_is_never_empty_and_a_socket_that_is_never_empty_do_not_stop_the_loop():
    async def main():
        stop = threading.Event()
        with ends() as (_, child, _):
            for _ in range(10):
                child.record(Kind.LOG, 1)
            ring = child._ring
            record = frames.encode(Kind.LOG, "x" * 24)
            while ring.write(record):
                pass

            def fill():
                while not stop.is_set():
                    ring._counters[0] = ring._counters[8] + CAPACITY

            def flood():
                progress = frames.encode(Kind.PROGRESS) * 1000
                with contextlib.suppress(OSError):
                    while not stop.is_set():
                        child._sock.send(progress)

            threads = [threading.Thread(target=fill), threading.Thread(target=flood)]
            for thread in threads:
                thread.start()
            try:
                # The interpreter lock is shared with both threads here; what matters is that the loop gets its turns.
                assert await lateness(2) < 6 * LATE
            finally:
                stop.set()
                child._sock.shutdown(socket.SHUT_RDWR)
                for thread in threads:
                    thread.join(10)

    asyncio.run(main())


def lingering_socket():
    """Return a TCP socket whose close waits for a peer that does not read, and that peer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
    ours.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            ours.send(bytes(1 << 16))
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 20))
    return ours, peer


@pytest.mark.parametrize("unread", [False, True])
def test_the_close_of_what_a_task_handed_over_is_not_waited_for(unread):
    async def main():
        lingering, peer = lingering_socket()
        with ends() as (supervisor, child, closed), peer:
            progress = frames.encode(Kind.PROGRESS, descriptors=1)
            send(child._sock, progress, [lingering.fileno()])
            os.close(lingering.detach())
            # The last copy is on its way to the supervisor now.
            begun = time.monotonic()
            if unread:
                supervisor.close()
            else:
                await poll(closed)
                assert "no memory" in str(closed[0])
            assert time.monotonic() - begun < LATE
            assert await lateness(0.3) < LATE

    asyncio.run(main())


def test_what_others_send_after_the_end_is_not_waited_for():
    async def main():
        seen = []
        with ends(seen.append) as (supervisor, child, _):
            child.send(frames.encode(Kind.LOG, "last words"))
            stop = threading.Event()

            def flood():
                noise = frames.encode(Kind.PROGRESS) * 1000
                with contextlib.suppress(OSError):
                    while not stop.is_set():
                        child._sock.send(noise)

            thread = threading.Thread(target=flood)
            thread.start()
            begun = time.monotonic()
            supervisor.drain()
            took = time.monotonic() - begun
            stop.set()
            child._sock.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            assert took < LATE
            assert seen[0].fields == ["last words"]

    asyncio.run(main())


def test_whatever_a_frame_does_to_us_those_behind_it_are_closed():
    def on_frame(frame):
        close_all(frame.descriptors)
        raise TypeError("a bug")

    async def main():
        with ends(on_frame) as (_, child, closed):
            memory = os.memfd_create("test", os.MFD_CLOEXEC)
            try:
                for _ in range(3):
                    send(child._sock, frames.encode(Kind.STATE, descriptors=2), [memory, memory])
            finally:
                os.close(memory)
            await poll(closed)
            assert "could not be handled: TypeError" in str(closed[0])

    asyncio.run(main())


@pytest.mark.parametrize("refused", [[], {}, 5, "nothing", b"memory"])
def test_a_failure_that_names_no_resource_is_a_violation(refused):
    with pytest.raises(ProtocolViolation, match="names a resource"):
        messages.parse_failure(Frame(Kind.FAILURE, ["E", "m", "t", refused], []))


@pytest.mark.parametrize("kind", ["pipe", "file", "socket", "device"])
def test_what_is_no_memory_is_refused_and_closed(kind):
    async def main():
        with ends() as (_, child, closed):
            given = {
                "pipe": os.pipe,
                "file": lambda: (os.open(__file__, os.O_RDONLY),),
                "socket": lambda: [end.detach() for end in socket.socketpair()],
                "device": lambda: (os.open(os.devnull, os.O_RDONLY),),
            }[kind]()
            send(child._sock, frames.encode(Kind.RESULT, [], descriptors=len(given)), list(given))
            for descriptor in given:
                os.close(descriptor)
            await poll(closed)
            assert "no memory" in str(closed[0])

    asyncio.run(main())
