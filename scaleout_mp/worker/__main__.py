"""Guardian and template. Run as `python -m scaleout_mp.worker SCRATCH LOOKOUT [GROUP]`.

Standard input is the template's control channel, SCRATCH the folder of the tasks' scratch folders, LOOKOUT the
descriptor of the guardian's own channel, GROUP the folder of the template's cgroup. What the template imports is
imported after the fork, so that the guardian stays small.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import signal
import socket
import sys
from typing import TYPE_CHECKING

from scaleout_mp.sandbox import process
from scaleout_mp.sandbox.tree_group import TreeGroup
from scaleout_mp.worker.guardian import Guardian

if TYPE_CHECKING:
    from typing import NoReturn


def main() -> NoReturn:
    """Run guardian and template."""
    sock = socket.socket(fileno=os.dup(0))
    lookout = socket.socket(fileno=int(sys.argv[2]))
    lookout.set_inheritable(False)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    # What these mean is the supervisor's to decide, whoever else they were sent to.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    process.forbid_core_files()
    process.adopt_orphans()
    supervisor = os.getppid()
    group = TreeGroup(sys.argv[3]) if len(sys.argv) > 3 else None
    guardian = Guardian(sock, lookout, supervisor=supervisor, scratch=sys.argv[1], group=group)
    above = os.getpid()
    pid = os.fork()
    if pid:
        guardian.watch(pid)
    process.die_with_parent(above)
    process.adopt_orphans()
    lookout.close()
    if group is not None:
        # The supervisor looks whether it has; nothing depends on it.
        with contextlib.suppress(OSError):
            group.join()
    # The guardian alone may run before all others.
    process.limit_own(resource.RLIMIT_RTPRIO, 0)
    # Of this process, and by inheritance of every task: the Python stack at the moment of a crash.
    faulthandler.enable(file=2)
    from scaleout_mp.ipc.channel import ChildChannel
    from scaleout_mp.worker.template import Template

    Template(ChildChannel(sock), supervisor).serve()


if __name__ == "__main__":
    main()
