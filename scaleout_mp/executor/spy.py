"""Where a process is that answers no signal: py-spy reads it from outside, where it is installed (extra `stacks`).

It reads the memory of the process, which the kernel allows to this program for its own user's and, where yama asks for
more, for whom the process has named (`process.may_be_read_by`). What it writes comes from that memory: hostile bytes.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import sys
from typing import Final

from scaleout_mp.sandbox import tree

_PROGRAM: Final = "py-spy"
#: Bytes that it may have in memory, whatever it finds.
_MEMORY: Final = 1 << 30


def program() -> str | None:
    """Return the path of py-spy, of this interpreter's environment first; None: it is not installed."""
    places = [os.path.dirname(sys.executable), *os.get_exec_path()]
    return shutil.which(_PROGRAM, path=os.pathsep.join(places))


def read_stacks(pid: int, tag: int, descriptor: int, *, seconds: float) -> bool:
    """Write the Python stacks of all threads of a process to a memfd of bounded size; return whether they are its own.

    Blocks, 10 to 100 ms and no longer than `seconds`. The process is not stopped for it.
    """
    path = program()
    if path is None or not tree.wears(pid, tag):
        return False
    # With no environment: whoever may look into it, as tasks at level "none", finds nothing of ours in it.
    try:
        spy = subprocess.Popen(
            [path, "dump", "--nonblocking", "--pid", str(pid)],
            env={},
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        # This user may have no more processes, or this program no more descriptors: the stacks are a courtesy.
        return False
    with spy:
        try:
            with contextlib.suppress(OSError):
                resource.prlimit(spy.pid, resource.RLIMIT_AS, (_MEMORY, _MEMORY))
            spy.wait(seconds)
        except subprocess.TimeoutExpired:
            # What it has written so far may tell enough.
            spy.kill()
    # By its number another process could have been read, had this one gone.
    return tree.wears(pid, tag)
