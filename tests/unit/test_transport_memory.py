"""What a long outage costs in memory: next to nothing, however much waits."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

from scaleout_mp.supervisor.messages import Moments, record_message
from scaleout_mp.task import MetricRecord
from scaleout_mp.transport.journal import Journal
from scaleout_mp.transport.link import LinkWatch
from scaleout_mp.transport.outbox import Outbox

#: Metrics that wait; a million, which is as many as may, in `make test-all`.
COUNT = 1_000_000 if os.environ.get("SCALEOUT_MP_ALL_TESTS") else 100_000


class Dead:
    """A combiner that never answers."""

    def __init__(self):
        self.link = LinkWatch()

    def speaks(self, method):
        return False

    async def once(self, method, packed):
        await asyncio.Event().wait()


def own_memory():
    """Return the bytes of private memory that this process has."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:"))


async def wait_long(folder, count):
    """Log that many metrics while nothing goes out; return the memory that it took beyond that before, in parts."""
    journal = Journal(str(folder / "journal.db"))
    await journal.open()
    outbox = Outbox(Dead(), journal)
    moments = Moments()
    before, held = own_memory(), []
    for step in range(1, count + 1):
        record = MetricRecord(metrics={"loss": 0.5}, step=step, timestamp=1e9 + step)
        outbox.put(*record_message("client", record, moments), task_id="task")
        if step % 1000 == 0:
            # As a task that trains would: the disk keeps up.
            await journal.synced()
        if step % (count // 10) == 0:
            held.append(own_memory() - before)
    assert outbox.counts.pending == count
    assert outbox.counts.dropped == 0
    await outbox.aclose()
    await journal.aclose()
    return held


def test_what_waits_on_the_disk_takes_no_memory(tmp_path):
    # In a process of its own: what other tests left free would hide what this takes.
    command = [sys.executable, __file__, str(tmp_path), str(COUNT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    held = json.loads(done.stdout)
    print(f"{COUNT} metrics wait: {[round(part / 1e6, 1) for part in held]} MB")
    assert held[0] < 24 << 20
    # From the first tenth on, all goes to the disk alone.
    assert max(held) < held[0] + (8 << 20)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(wait_long(Path(sys.argv[1]), int(sys.argv[2])))))
