"""The outbox under crashes: whatever happens at whatever moment, what was on the disk arrives, and in order."""

from __future__ import annotations

import asyncio
import collections
import itertools
import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scaleout_mp.errors import CallError
from scaleout_mp.transport.backoff import Backoff
from scaleout_mp.transport.journal import Journal
from scaleout_mp.transport.link import LinkWatch
from scaleout_mp.transport.message import MessageKind
from scaleout_mp.transport.outbox import Outbox
from scaleout_mp.wire import edge_pb2 as pb

DOWN = CallError("UNAVAILABLE", code="UNAVAILABLE", transient=True)
TASKS = st.sampled_from(["one", "two"])


class Server:
    """What arrives, in order; it outlives the clients. `failing`: some calls fail, before or after they arrive."""

    def __init__(self):
        self.up = True
        self.failing = False
        self.arrived: list[bytes] = []
        self._number = itertools.count()

    def call(self, packed):
        fate = next(self._number) % 5 if self.failing else None
        if not self.up or fate == 1:
            raise DOWN
        self.arrived.append(packed)
        if fate == 3:
            raise DOWN


class Calls:
    def __init__(self, server):
        self.link = LinkWatch()
        self.server = server

    def speaks(self, method):
        return False

    async def once(self, method, packed):
        await asyncio.sleep(0)
        self.server.call(packed)
        await asyncio.sleep(0)


class Crashes(RuleBasedStateMachine):
    """Put, deliver, crash, start again; the link comes and goes."""

    @initialize()
    def begin(self):
        self.root = Path(tempfile.mkdtemp(prefix="crash-"))
        self.loop = asyncio.new_event_loop()
        self.server = Server()
        self.number = itertools.count()
        self.runs = itertools.count()
        self.folder = self.root / "first"
        self.folder.mkdir()
        #: What the client promised to deliver, and what it may have lost: not on the disk when it crashed.
        self.promised = {"one": [], "two": []}
        self.fresh = []
        self.do(self.start())

    def do(self, coroutine):
        return self.loop.run_until_complete(coroutine)

    async def start(self):
        self.journal = Journal(str(self.folder / "journal.db"))
        await self.journal.open()
        self.outbox = Outbox(Calls(self.server), self.journal, retries=Backoff(first=0.001, cap=0.002, jitter=0))
        await self.outbox.load()

    async def stop(self):
        await self.outbox.aclose()
        await self.journal.aclose()

    def put(self, kind, message, task):
        ticket = self.outbox.put(kind, message, task_id=task)
        self.fresh.append((task, ticket))

    @rule(task=TASKS, count=st.integers(1, 40))
    def log(self, task, count):
        async def act():
            for _ in range(count):
                name = f"{task} {next(self.number):06}"
                self.put(MessageKind.METRIC, pb.ModelMetric(model_id=name), task)

        self.do(act())

    @rule(task=TASKS)
    def hand_over(self, task):
        async def act():
            name = f"{task} {next(self.number):06}"
            self.put(MessageKind.UPDATE, pb.ModelUpdate(model_id=name, round_id="result"), task)

        self.do(act())

    @rule(turns=st.integers(1, 30))
    def go_on(self, turns):
        async def act():
            for _ in range(turns):
                await asyncio.sleep(0)

        self.do(act())

    @rule()
    def pause(self):
        self.do(asyncio.sleep(0.006))

    @rule()
    def sync(self):
        assert self.do(self.journal.synced())
        self.keep_promises()

    def keep_promises(self):
        for task, ticket in self.fresh:
            self.promised[task].append(ticket.packed)
        self.fresh = []

    @rule()
    def cut_the_link(self):
        self.server.up = False

    @rule(failing=st.booleans())
    def mend_the_link(self, failing):
        self.server.up, self.server.failing = True, failing

    @rule()
    def crash(self):
        """Leave the files as kill -9 leaves them, and start again from those."""
        after = self.root / f"after-{next(self.runs)}"
        shutil.copytree(self.folder, after)
        self.server_before, self.server.up = self.server.up, False
        seen = len(self.server.arrived)
        self.do(self.stop())
        del self.server.arrived[seen:]
        shutil.rmtree(self.folder)
        self.folder = after
        self.fresh = []
        self.server.up = self.server_before
        self.do(self.start())

    @rule()
    @precondition(lambda self: not self.fresh)
    def end_well(self):
        self.do(self.stop())
        self.do(self.start())

    @invariant()
    def results_come_after_what_was_put_before_them(self):
        if not hasattr(self, "server"):
            return
        first = {}
        for place, packed in enumerate(self.server.arrived):
            first.setdefault(packed, place)
        for packets in self.promised.values():
            places = [first.get(packed) for packed in packets]
            for index, packed in enumerate(packets):
                if is_result(packed) and places[index] is not None:
                    assert all(place is not None and place < places[index] for place in places[:index])

    def teardown(self):
        if not hasattr(self, "server"):
            return
        try:
            self.sync()
            self.server.up, self.server.failing = True, False
            assert self.do(self.outbox.drain(10))
            assert self.outbox.counts.pending == self.outbox._stock.total == 0
            arrived = collections.Counter(self.server.arrived)
            for packets in self.promised.values():
                assert all(arrived[packed] for packed in packets)
            rows = self.do(self.journal.rows("SELECT (SELECT count(*) FROM records), (SELECT count(*) FROM results)"))
            assert rows == [(0, 0)]
        finally:
            self.do(self.stop())
            self.loop.close()
            shutil.rmtree(self.root)


def is_result(packed):
    return b"result" in packed


TestCrashes = Crashes.TestCase
TestCrashes.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
