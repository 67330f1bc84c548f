"""What blocks goes on a thread, and is done all the same where none can be had."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from scaleout_mp.executor.beside import beside

# No room for the stack of another thread, as little as for another process of a user who has all that he may.
WITHOUT_THREADS = """
import asyncio, resource, threading
from scaleout_mp.executor.beside import beside

async def main():
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20), resource.RLIM_INFINITY))
    try:
        threading.Thread(target=print).start()
    except RuntimeError:
        print(await beside(threading.current_thread) is threading.main_thread())
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

asyncio.run(main())
"""


def test_what_blocks_goes_on_a_thread():
    assert asyncio.run(beside(threading.current_thread)) is not threading.main_thread()


def test_it_is_done_where_no_thread_can_be_had():
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_THREADS], capture_output=True, text=True, timeout=30, check=False
    )
    assert (run.stdout, run.returncode) == ("True\n", 0), run.stderr


def test_an_error_of_the_work_is_its_own():
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match=r"^no$"):
        asyncio.run(beside(fail))
