"""Floods: more records, more log lines and more output than anybody wants."""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import sys
import threading
import time

import msgpack
from fault_catalogue import fault

from scaleout_mp import EndReason, current_task

COMPLETED, CRASHED = EndReason.COMPLETED, EndReason.CRASHED
SECONDS = 0.5
#: Bytes that may wait for somebody who reads a task's records.
WAITING = {"peak": 96 << 20}
#: The stage gives this logger no handler of pytest's, which keeps every record.
LOGGER = "fault.flood"
METRIC, PROGRESS = 16, 22


def _flood(action):
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        action()
    return "done"


@fault(COMPLETED, returns="done", **WAITING)
def metrics_without_pause(_):
    task = current_task()
    return _flood(lambda: task.log_metric({"loss": 1.0}))


@fault(COMPLETED, returns="done", **WAITING)
def metrics_of_four_thousand_names(_):
    task = current_task()
    metrics = {f"{number}{'x' * 100}": 1.0 for number in range(4000)}
    return _flood(lambda: task.log_metric(metrics))


@fault(COMPLETED, returns="done", **WAITING)
def attributes_of_a_megabyte(_):
    task = current_task()
    attributes = {str(number): "x" * 60_000 for number in range(16)}
    return _flood(lambda: task.log_attributes(attributes))


@fault(COMPLETED, returns="done", **WAITING)
def telemetry_from_many_threads(_):
    task = current_task()
    threads = [
        threading.Thread(target=_flood, args=(lambda: task.log_telemetry({"load": 1.0}),), daemon=True)
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return "done"


@fault(COMPLETED, returns="done")
def log_lines_without_pause(_):
    logger = logging.getLogger(LOGGER)
    return _flood(lambda: logger.error("x" * 10_000))


@fault(COMPLETED, returns="done")
def frames_of_nothing(_):
    body = msgpack.packb([PROGRESS, 0])
    frames = (struct.pack("<I", len(body)) + body) * 1000
    return _flood(lambda: os.write(3, frames))


@fault(CRASHED, signal="SIGKILL", **WAITING)
def metrics_until_it_dies(_):
    task = current_task()
    _flood(lambda: task.log_metric({"loss": 1.0}))
    os.kill(os.getpid(), 9)


@fault(COMPLETED, returns="done", note="of its output are not in this report")
def fifty_megabytes_of_output(_):
    for _ in range(50):
        sys.stdout.write("x" * (1 << 20))
    return "done"


@fault(COMPLETED, returns="done", note="of its output are not in this report")
def output_of_random_bytes(_):
    for descriptor in (1, 2):
        for _ in range(100):
            os.write(descriptor, os.urandom(10_000))
    return "done"


@fault(COMPLETED, returns="done")
def output_of_escape_sequences(_):
    print("\x1b[2J\x1b]0;title\x07" * 1000, file=sys.stderr)
    return "done"


@fault(COMPLETED, returns="done", note="had to be killed")
def output_from_twenty_processes(_):
    for _ in range(20):
        if os.fork() == 0:
            with contextlib.suppress(OSError):
                while True:
                    os.write(2, b"x" * 100_000)
            os._exit(0)
    time.sleep(SECONDS)
    return "done"
