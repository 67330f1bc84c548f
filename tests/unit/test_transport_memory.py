"""What a long outage costs in memory: next to nothing, however much waits."""

from __future__ import annotations

import asyncio
import tracemalloc

from scaleout_mp.supervisor.messages import Moments, record_message
from scaleout_mp.task import MetricRecord
from scaleout_mp.transport.journal import Journal
from scaleout_mp.transport.link import LinkWatch
from scaleout_mp.transport.outbox import Outbox


class Dead:
    """A combiner that never answers."""

    def __init__(self):
        self.link = LinkWatch()

    def speaks(self, method):
        return False

    async def once(self, method, packed):
        await asyncio.Event().wait()


async def wait_long(folder, count):
    """Log that many metrics while nothing goes out; return the bytes of memory that wait, at three moments."""
    journal = Journal(str(folder / "journal.db"))
    await journal.open()
    outbox = Outbox(Dead(), journal)
    moments = Moments()
    held = []
    tracemalloc.start()
    try:
        for step in range(1, count + 1):
            record = MetricRecord(metrics={"loss": 0.5}, step=step, timestamp=1e9 + step)
            outbox.put(*record_message("client", record, moments), task_id="task")
            if step % 1000 == 0:
                await asyncio.sleep(0)
            if step % (count // 3) == 0:
                await journal.synced()
                held.append(tracemalloc.get_traced_memory()[0])
        assert outbox.counts.pending == count
        assert outbox.counts.dropped == 0
        return held
    finally:
        tracemalloc.stop()
        await outbox.aclose()
        await journal.aclose()


def test_what_waits_on_the_disk_takes_no_memory(tmp_path):
    held = asyncio.run(wait_long(tmp_path, 60_000))
    assert held[0] < 10 << 20
    # From the first third on, all goes to the disk alone.
    assert held[2] < held[0] + (1 << 20)
