"""Standard input, output and error of this program, which may lack some: started with `>&-`, or as a daemon."""

from __future__ import annotations

import os
import subprocess
import sys


def fill_missing() -> None:
    """Open /dev/null as each of the descriptors 0 to 2 that is not there.

    Else a socket of ours gets its number, and what C libraries print goes into that.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest number that is free.
            null = os.open(os.devnull, os.O_RDWR)
            if null == descriptor:
                os.set_inheritable(null, True)
            else:
                # Another thread has just taken it.
                os.close(null)


def replace_missing() -> None:
    """Have `sys.stdout` and `sys.stderr` lead somewhere: Python has None for those that were not there at its start."""
    fill_missing()
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w", encoding="utf-8", errors="backslashreplace", closefd=False))  # noqa: SIM115


def for_child(descriptor: int) -> int | None:
    """Return what `subprocess.Popen` is to make of one of them: /dev/null where something else has taken its number."""
    # What is inherited was meant to be; an event loop's own descriptors for example are closed on exec.
    return None if os.get_inheritable(descriptor) else subprocess.DEVNULL
