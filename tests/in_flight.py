"""Programs in which the kernel refuses every descriptor that is sent. Each runs in a process of its own."""

from __future__ import annotations

import array
import contextlib
import os
import resource
import socket
import threading

import pytest

from scaleout_mp.errors import ChannelError
from scaleout_mp.ipc import frames
from scaleout_mp.ipc.channel import ChildChannel, channel_pair
from scaleout_mp.ipc.frames import Kind
from scaleout_mp.sandbox import capabilities

#: Descriptors that this process may have: those of other processes are not refused.
_MOST = 200


@contextlib.contextmanager
def too_many_in_flight():
    """Have more descriptors under way than this process may have, so that it cannot send another."""
    capabilities.keep(capabilities.OF_TRAINING)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MOST, _MOST))
    parked = park(_MOST + 1)
    with contextlib.closing(parked[0]), contextlib.closing(parked[1]):
        yield parked


def park(count):
    """Send that many descriptors to nobody, and return both ends."""
    ends = socket.socketpair()
    for size in [100] * (count // 100) + [count % 100]:
        rights = array.array("i", [ends[0].fileno()] * size)
        ends[0].sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    return ends


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


if __name__ == "__main__":
    import sys

    globals()[sys.argv[1]]()
