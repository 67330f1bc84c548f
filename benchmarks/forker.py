"""The floor: a process as warm as our template that does nothing but fork, one child a line on standard input.

The modules named on the command line are loaded first.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import time

import numpy as np

import scaleout_mp.model
import scaleout_mp.worker.template

WARM = (np, scaleout_mp.model, scaleout_mp.worker.template)


def main() -> None:
    for module in sys.argv[1:]:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    reader, writer = os.pipe()
    print("ready", flush=True)
    for _ in sys.stdin:
        before = time.monotonic_ns()
        pid = os.fork()
        if pid == 0:
            os.write(writer, time.monotonic_ns().to_bytes(8, "little"))
            os._exit(0)
        in_child = int.from_bytes(os.read(reader, 8), "little")
        os.waitpid(pid, 0)
        print(in_child - before, flush=True)


if __name__ == "__main__":
    main()
