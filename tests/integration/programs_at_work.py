"""Run a program of ours as its users do, and look for whatever it left behind."""

from __future__ import annotations

import contextlib
import os
import pty
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid

import psutil
import pytest

#: In the environment of the program and of all that it starts. Tasks get it, for it begins like a setting of language.
MARK = "LC_SMP_TEST_RUN"


class Program:
    """A program that runs; its output is read line by line. A context manager: it does not outlive the block."""

    def __init__(self, *command, cwd=None, env=None):
        self.mark = uuid.uuid4().hex
        self.command = [sys.executable, *map(str, command)]
        self.lines: list[str] = []
        self._new: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            self.command,
            cwd=cwd,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {}), MARK: self.mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        with self._process.stdout as stream:
            for line in stream:
                self._new.put(line.rstrip("\n"))
        self._new.put(None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        # Its descendants may hold its output open.
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._reader.join()

    @property
    def pid(self):
        return self._process.pid

    def wait_for_line(self, text, *, seconds):
        """Read on until a line has `text` in it, and return that line."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self._new.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                pytest.fail(f"{text!r} did not come within {seconds} s; output:\n" + "\n".join(self.lines))
            if line is None:
                pytest.fail(f"the program ended without {text!r}; output:\n" + "\n".join(self.lines))
            self.lines.append(line)
            if text in line:
                return line

    def send(self, number):
        self._process.send_signal(number)

    def terminate(self):
        self.send(signal.SIGTERM)

    @property
    def ended(self):
        """Whether it is over; then all its output is there."""
        return self._process.poll() is not None and self.end(seconds=0) is not None

    def kill(self):
        self.send(signal.SIGKILL)

    def end(self, *, seconds):
        """Wait for the end; return the exit code. Afterwards `lines` has all output."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the program did not end within {seconds} s; output:\n" + "\n".join(self.lines))
        self._reader.join(5)
        while not self._new.empty():
            line = self._new.get()
            if line is not None:
                self.lines.append(line)
        return code

    @property
    def output(self):
        return "\n".join(self.lines)

    def processes(self):
        """Return every living process that the program started, directly or not, wherever it hangs now."""
        return [process for process in psutil.process_iter() if _marked(process, self.mark)]

    def require_nothing_left(self, *, seconds):
        """Fail unless all processes are gone in time."""
        deadline = time.monotonic() + seconds
        while left := self.processes():
            if time.monotonic() > deadline:
                pytest.fail(f"left: {[process.as_dict(['pid', 'cmdline']) for process in left]}")
            psutil.wait_procs(left, timeout=max(0.0, deadline - time.monotonic()))


def on_a_terminal(command, *, seconds=60, then=None, **environment):
    """Run a program on a terminal of its own; return its exit code and all that it wrote there.

    `then` is called with the process and a function that returns the screen so far, while it runs.
    """
    ours, its = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40", **environment}
    try:
        process = subprocess.Popen([sys.executable, *command], stdin=its, stdout=its, stderr=its, env=environment)
    finally:
        os.close(its)
    shown = bytearray()

    def read():
        # A terminal whose other side is closed reads as EIO.
        try:
            while piece := os.read(ours, 65536):
                shown.extend(piece)
        except OSError:
            return

    reader = threading.Thread(target=read)
    reader.start()
    try:
        if then is not None:
            then(process, lambda: shown.decode(errors="replace"))
        code = process.wait(seconds)
    finally:
        process.kill()
        process.wait()
        reader.join()
        os.close(ours)
    return code, shown.decode()


def _marked(process, mark):
    with contextlib.suppress(psutil.Error):
        return process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
    return False
