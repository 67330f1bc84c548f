"""Network: sockets that are left open, and calls that wait for ever. A level may forbid them all the same."""

from __future__ import annotations

import array
import contextlib
import os
import signal
import socket
import time

from fault_catalogue import abort_when_ready, fault, say_ready

from scaleout_mp import EndReason, Limits

COMPLETED = EndReason.COMPLETED


def _listen(place):
    """Return a socket that listens on loopback; its port is in the fault's folder."""
    listener = socket.create_server(("127.0.0.1", 0))
    with open(f"{place.folder}/port", "w") as file:
        file.write(str(listener.getsockname()[1]))
    return listener


def _port_is_free(_, place):
    with contextlib.suppress(FileNotFoundError), open(f"{place.folder}/port") as file, socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", int(file.read())))


@fault(COMPLETED, returns="done", check=_port_is_free)
def a_port_held_by_a_daemon(place):
    with contextlib.suppress(PermissionError):
        listener = _listen(place)
        if os.fork() == 0:
            os.setsid()
            while True:
                listener.accept()
    return "done"


@fault(EndReason.INTERRUPTED_BY_CLIENT, drive=abort_when_ready, check=_port_is_free)
def a_call_that_nobody_makes(place):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(PermissionError):
        listener = _listen(place)
        say_ready()
        listener.accept()
    say_ready()
    time.sleep(1_000)


@fault(COMPLETED, returns="done")
def a_port_where_nobody_listens(_):
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", 9), timeout=1)
    return "done"


@fault(COMPLETED, returns="done")
def packets_to_nobody(_):
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(10_000):
            with contextlib.suppress(ConnectionRefusedError):
                sender.sendto(b"x", ("127.0.0.1", 9))
    return "done"


@fault(COMPLETED, returns="done")
def a_name_in_the_abstract_space(place):
    if os.fork() == 0:
        os.setsid()
        with socket.socket(socket.AF_UNIX) as listener, contextlib.suppress(PermissionError):
            listener.bind(f"\0{place.mark}")
            listener.listen()
            listener.accept()
        os._exit(0)
    return "done"


@fault(COMPLETED, returns="done")
def sockets_in_flight_in_a_circle(_):
    for _ in range(100):
        left, right = socket.socketpair()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [left.fileno(), right.fileno()]))]
        left.sendmsg([b"x"], rights)
        left.close()
        right.close()
    return "done"


@fault(EndReason.OPEN_FILES, limits=Limits(open_files=64, abort_grace=0.3))
def sockets_past_the_limit(_):
    return [socket.socketpair() for _ in range(100)]
