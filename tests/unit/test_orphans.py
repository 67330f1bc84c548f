"""What the template does about processes that fork and leave faster than it can reap them."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

from scaleout_mp.sandbox import process, tree
from scaleout_mp.worker.orphans import Orphans

TAG = 1 << 60


def a_dead_child_and_another_of_its_group() -> int:
    """Return the pid of the one that lives. It is killed in `main`."""
    reader, writer = os.pipe()
    leader = os.fork()
    if leader == 0:
        os.setsid()
        tree.wear_tag(TAG)
        mate = os.fork()
        if mate == 0:
            os.write(writer, os.getpid().to_bytes(4, "little"))
            signal.pause()
        os._exit(0)
    os.waitid(os.P_PID, leader, os.WEXITED | os.WNOWAIT)
    return int.from_bytes(os.read(reader, 4), "little")


def main() -> None:
    # As the template does: what it would otherwise leave to init is adopted, and killed below.
    process.adopt_orphans()
    mate = a_dead_child_and_another_of_its_group()
    descriptor = os.pidfd_open(mate)
    Orphans(lambda *_: None).hold_back([TAG])
    print("niceness", os.getpriority(os.PRIO_PROCESS, mate))
    print("ended", bool(select.select([descriptor], [], [], 0)[0]))
    Orphans(lambda *_: None).hold_back([])
    print("ended", bool(select.select([descriptor], [], [], 10)[0]))


def test_those_of_a_running_task_come_last_and_those_of_one_that_is_being_killed_are_killed():
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout.splitlines() == ["niceness 19", "ended False", "ended True"]


if __name__ == "__main__":
    main()
