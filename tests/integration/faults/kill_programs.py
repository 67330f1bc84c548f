"""What runs in supervisors and templates that are about to be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import time

from fault_catalogue import wear

from scaleout_mp import current_task


def family(mark):
    """Have children of every kind: in the same session, a daemon, a stopped one and another program."""
    wear(mark)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        time.sleep(1_000)
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        time.sleep(1_000)
    if os.fork() == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    current_task().log_metric({"ready": 1.0})
    time.sleep(1_000)


def files():
    """Leave files in the scratch folder."""
    for number in range(10):
        os.makedirs(f"{number}/{number}", exist_ok=True)


def echo(value):
    return value
