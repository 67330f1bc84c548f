"""What a task at level strict tries; each returns what came of it. Imported in task processes by name."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys


def attempt(action, *arguments):
    """Return "" for success, else the name of the error."""
    try:
        result = action(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno, type(error).__name__)
    if isinstance(result, int) and result > 2 and action is os.open:
        os.close(result)
    return ""


def read(path):
    with open(path, "rb") as file:
        return file.read()


def write(path, data=b"x"):
    with open(path, "wb") as file:
        file.write(data)


def litter(path):
    """Write a file that must not stay where a layer is missing."""
    try:
        write(path)
    finally:
        if os.path.exists(path):
            os.remove(path)


def files(secret, declared, output, folder):
    """Use files in every way that comes to mind."""
    return {
        "read a secret": attempt(read, secret),
        "list its folder": attempt(os.listdir, os.path.dirname(secret)),
        "overwrite it": attempt(write, secret),
        "remove it": attempt(os.remove, secret),
        "truncate it": attempt(os.truncate, secret, 0),
        "change its mode": attempt(os.chmod, secret, 0o777),
        "change its times": attempt(os.utime, secret, (0, 0)),
        "rename it": attempt(os.rename, secret, secret + "2"),
        "link to it": attempt(os.link, secret, os.path.join(folder, "link")),
        "write to /tmp": attempt(litter, f"/tmp/scaleout-strict-{os.getpid()}"),
        "write beside the modules": attempt(litter, os.path.join(os.path.dirname(__file__), "written-by-a-task")),
        "write to the interpreter": attempt(litter, os.path.join(sys.prefix, "written-by-a-task")),
        "read what is declared": attempt(read, declared),
        "write what is declared for reading": attempt(write, declared),
        "change the mode of what is declared for reading": attempt(os.chmod, declared, 0o777),
        "write where it is declared": attempt(write, os.path.join(output, "result")),
        "make a folder there": attempt(os.mkdir, os.path.join(output, f"folder-{os.getpid()}")),
        "read it again": attempt(read, os.path.join(output, "result")),
        "run a program": attempt(subprocess.check_output, [sys.executable, "-c", "import numpy"]),
        "write to null": attempt(write, os.devnull),
        "make a device": attempt(os.mknod, os.path.join(output, "device"), 0o20666, os.makedev(1, 3)),
        "write shared memory": attempt(litter, f"/dev/shm/strict-{os.getpid()}"),
    }


def _connect(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as client:
        client.settimeout(5)
        client.connect(address)


def _send(address):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"x", address)


def _open_socket(family, kind, protocol=0):
    socket.socket(family, kind, protocol).close()


def _talk_to_itself():
    with socket.create_server(("127.0.0.1", 0)) as server:
        _connect(socket.AF_INET, server.getsockname())


def network(tcp, udp, path, abstract):
    """Reach servers outside of the sandbox, of which each is there."""
    return {
        "tcp": attempt(_connect, socket.AF_INET, tuple(tcp)),
        "udp": attempt(_send, tuple(udp)),
        "unix socket": attempt(_connect, socket.AF_UNIX, path),
        "abstract socket": attempt(_connect, socket.AF_UNIX, abstract),
        "packet socket": attempt(_open_socket, socket.AF_PACKET, socket.SOCK_RAW),
        "vsock": attempt(_open_socket, socket.AF_VSOCK, socket.SOCK_STREAM),
        "raw socket": attempt(_open_socket, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
        "itself": attempt(_talk_to_itself),
    }


def leave_shared_memory():
    """Leave things in /dev/shm, as a killed task does; return what was there before."""
    found = sorted(os.listdir("/dev/shm"))
    os.makedirs("/dev/shm/folder/in/folder")
    write("/dev/shm/folder/in/folder/file", b"x" * 1000)
    write("/dev/shm/left-over")
    os.chmod("/dev/shm/folder", 0)
    os.kill(os.getpid(), 9)
    return found


def shared_memory():
    return sorted(os.listdir("/dev/shm"))
