"""The journal: batches, order, a full disk, a damaged file."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import types

import pytest

from scaleout_mp.errors import StateError
from scaleout_mp.supervisor.task_journal import TaskJournal
from scaleout_mp.transport.backoff import Backoff
from scaleout_mp.transport.journal import Journal
from scaleout_mp.transport.lane import HELD
from scaleout_mp.transport.link import LinkWatch
from scaleout_mp.transport.message import MessageKind, Ticket
from scaleout_mp.transport.outbox import Outbox
from scaleout_mp.transport.reserve import SIZE, Reserve
from scaleout_mp.wire import edge_pb2 as pb

INSERT = "INSERT INTO results(id, lane, kind, packed) VALUES(?, '', 'STATUS', ?)"
RECORD = "INSERT INTO records(lane, id, kind, packed) VALUES(?, ?, 'METRIC', ?)"
COUNT = "SELECT count(*) FROM records"


class Calls:
    """A combiner behind a gate: what arrives, in order."""

    def __init__(self):
        self.link = LinkWatch()
        self.gate = asyncio.Event()
        self.arrived = []
        self.messages = []

    def speaks(self, method):
        return False

    async def once(self, method, packed):
        self.messages.append(packed)
        message = method.request.FromString(packed)
        if hasattr(message, "model_id"):
            self.arrived.append(message.model_id)
        await self.gate.wait()


@contextlib.asynccontextmanager
async def opened(path):
    journal = Journal(str(path))
    await journal.open()
    try:
        yield journal
    finally:
        await journal.aclose()


def metric(name):
    return MessageKind.METRIC, pb.ModelMetric(model_id=str(name))


def packed(message):
    return message[0], message[1].SerializeToString()


def box(calls, journal):
    return Outbox(calls, journal, retries=Backoff(first=0.001, jitter=0))


async def stored(journal):
    return (await journal.rows(COUNT))[0][0]


async def fill_up(journal):
    """Have the file take no more than it has: what a full disk looks like to SQLite."""
    await journal.rows("PRAGMA max_page_count=1")


async def make_room(journal):
    await journal.rows("PRAGMA max_page_count=1000000")


def test_reads_know_all_that_was_written_before_and_batches_are_whole(tmp_path):
    async def scenario():
        async with opened(tmp_path / "j") as journal:
            for number in range(5000):
                journal.write(INSERT, (number, b"x"), vital=False)
                if number == 2500:
                    seen = asyncio.ensure_future(journal.rows("SELECT count(*) FROM results"))
                    await asyncio.sleep(0)
            assert await journal.synced()
            return (await seen)[0][0], (await journal.rows("SELECT count(*) FROM results"))[0][0]

    assert asyncio.run(scenario()) == (2501, 5000)


def test_what_was_synced_is_seen_by_another_process_at_once(tmp_path):
    async def scenario():
        async with opened(tmp_path / "j") as journal:
            journal.write(INSERT, (1, b"x"))
            assert await journal.synced()
            with contextlib.closing(sqlite3.connect(tmp_path / "j")) as other:
                return other.execute("SELECT id, packed FROM results").fetchall()

    assert asyncio.run(scenario()) == [(1, b"x")]


def test_a_message_that_arrives_at_once_is_never_written(tmp_path):
    async def scenario():
        calls = Calls()
        calls.gate.set()
        async with opened(tmp_path / "j") as journal:
            outbox = box(calls, journal)
            for step in range(100):
                await outbox.put(*metric(step), task_id="t").delivered()
            inserted = await journal.rows("SELECT total_changes()")
            await outbox.aclose()
            return len(calls.arrived), inserted

    arrived, inserted = asyncio.run(scenario())
    assert arrived == 100
    # Each takes a fraction of the time in which the journal gathers what it writes; on a busy machine, a larger one.
    assert inserted[0][0] < 100


def test_many_records_wait_on_the_disk_and_arrive_in_order(tmp_path):
    count = 3 * HELD

    async def scenario():
        calls = Calls()
        async with opened(tmp_path / "j") as journal:
            outbox = box(calls, journal)
            for step in range(count):
                outbox.put(*metric(step), task_id="t")
            update = outbox.put(MessageKind.UPDATE, pb.ModelUpdate(model_id="u"), task_id="t")
            in_memory = len(outbox._lanes["t"].unsettled())
            assert await stored(journal) == count
            calls.gate.set()
            await update.delivered()
            await outbox.put(*metric("after"), task_id="t").delivered()
            assert await outbox.drain(5)
            assert await stored(journal) == 0
            assert outbox._stock.total == 0
            await outbox.aclose()
        return in_memory, calls.arrived

    in_memory, arrived = asyncio.run(scenario())
    assert in_memory <= HELD + 1
    assert arrived == [*map(str, range(count)), "u", "after"]


def test_what_an_earlier_run_left_goes_first_and_byte_for_byte(tmp_path):
    async def first_run():
        async with opened(tmp_path / "j") as journal:
            outbox = box(Calls(), journal)
            tickets = [outbox.put(*metric(step), task_id="t") for step in range(HELD + 100)]
            tickets.append(outbox.put(MessageKind.UPDATE, pb.ModelUpdate(model_id="u"), task_id="t"))
            tickets.append(outbox.put(MessageKind.TELEMETRY, pb.TelemetryMessage(client_id="c")))
            await journal.synced()
            await outbox.aclose()
            return [ticket.packed for ticket in tickets]

    async def next_run():
        calls = Calls()
        async with opened(tmp_path / "j") as journal:
            outbox = box(calls, journal)
            assert await outbox.load() == HELD + 102
            assert outbox.counts.pending == HELD + 102
            outbox.put(*metric("new"), task_id="t")
            calls.gate.set()
            assert await outbox.drain(10)
            assert outbox._stock.total == 0
            await outbox.aclose()
        return calls

    put = asyncio.run(first_run())
    calls = asyncio.run(next_run())
    assert calls.arrived == [*map(str, range(HELD + 100)), "u", "new"]
    assert set(put) < set(calls.messages)


def test_a_full_disk_costs_records_that_memory_cannot_hold_and_nothing_else(tmp_path, caplog):
    async def scenario():
        calls = Calls()
        async with opened(tmp_path / "j") as journal:
            outbox = box(calls, journal)
            await fill_up(journal)
            for step in range(HELD + 500):
                outbox.put(*metric(step), task_id="t")
            update = outbox.put(MessageKind.UPDATE, pb.ModelUpdate(model_id="u"), task_id="t")
            await journal.synced()
            for _ in range(10):
                outbox.put(*metric("late" * 1000), task_id="t")
            await journal.synced()
            calls.gate.set()
            await asyncio.wait_for(update.delivered(), 10)
            assert await outbox.drain(5)
            dropped = outbox.take_dropped("t")
            await outbox.aclose()
        return calls.arrived, dropped, outbox.counts

    arrived, dropped, counts = asyncio.run(scenario())
    assert arrived[: HELD + 1] == [*map(str, range(HELD)), "u"]
    # What came later found room in memory again.
    assert dropped == counts.dropped == 500
    assert counts.pending == 0
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "full" in warnings[0].getMessage()


def test_results_that_the_disk_did_not_take_are_written_once_there_is_room(tmp_path, caplog):
    async def scenario():
        async with opened(tmp_path / "j") as journal:
            await fill_up(journal)
            for number in range(10):
                journal.write(INSERT, (number, bytes(4096)))
            assert not await journal.synced()
            assert not await journal.synced()
            await make_room(journal)
            assert await journal.synced()
            return (await journal.rows("SELECT count(*) FROM results"))[0][0]

    with caplog.at_level(logging.INFO):
        assert asyncio.run(scenario()) == 10
    actions = [record.action for record in caplog.records if hasattr(record, "action")]
    assert actions == ["journal_failing", "journal_recovered"]


def test_a_full_disk_leaves_the_last_room_to_what_must_not_be_lost(tmp_path):
    async def scenario():
        lost = []
        async with opened(tmp_path / "j") as journal:
            journal.on_lost = lost.extend
            assert (tmp_path / "j-reserve").stat().st_size == SIZE
            await fill_up(journal)
            record, result = Ticket(1, "t", *packed(metric("a" * 9000))), Ticket(2, "t", *packed(metric("b")))
            journal.write(RECORD, ("t", 1, record.packed), vital=False, ticket=record)
            await journal.synced()
            assert not (tmp_path / "j-reserve").exists()
            # There is room by now; but until the reserve is held again it is not for records.
            await make_room(journal)
            journal.write(RECORD, ("t", 2, result.packed), vital=False, ticket=result)
            journal.write(INSERT, (3, bytes(4096)))
            assert await journal.synced()
            assert await journal.rows(COUNT) == [(0,)]
            return lost == [record, result], await journal.rows("SELECT id FROM results")

    assert asyncio.run(scenario()) == (True, [(3,)])


def test_the_reserve_is_held_again_once_there_is_room_for_a_while(tmp_path):
    now = [0.0]
    reserve = Reserve(str(tmp_path / "r"), clock=lambda: now[0])
    assert not reserve.give()
    reserve.take()
    assert not reserve.given
    assert reserve.give()
    assert not (tmp_path / "r").exists()
    assert reserve.given
    now[0] = 3.0
    assert not reserve.given
    assert (tmp_path / "r").stat().st_blocks * 512 >= SIZE
    reserve.close()
    # Where there is no such folder there is no reserve, and all goes on without.
    lost = Reserve(str(tmp_path / "none" / "r"))
    lost.take()
    assert not lost.given
    assert not lost.give()


SMALL_DISK = """
import asyncio, os, sys
from scaleout_mp.supervisor.task_journal import TaskJournal
from scaleout_mp.supervisor.taskbook import TaskStatus
from scaleout_mp.transport.journal import Journal
from scaleout_mp.transport.message import MessageKind, Ticket
from scaleout_mp.wire import edge_pb2 as pb

async def fill(path):
    journal = Journal(path)
    await journal.open()
    held = os.stat(path + "-reserve").st_size
    tasks = TaskJournal(journal)
    tasks.received(pb.TaskRequest(correlation_id="task"))
    lost = []
    journal.on_lost = lost.extend
    number = 0
    while not lost:
        for number in range(number + 1, number + 101):
            row = "task", number, os.urandom(900)
            ticket = Ticket(number, row[0], MessageKind.METRIC, row[2])
            journal.write("INSERT INTO records VALUES(?, ?, 'METRIC', ?)", row, vital=False, ticket=ticket)
        await journal.synced()
    await tasks.ended("task", TaskStatus.COMPLETED, "{}")
    return held, await journal.synced()

async def known(path):
    # As after kill -9: the first one was never closed.
    journal = Journal(path)
    await journal.open()
    return [task.stage.value for task in await TaskJournal(journal).known()]

found = []
for folder in sys.argv[1:]:
    path = os.path.join(folder, "j")
    found.append([*asyncio.run(fill(path)), asyncio.run(known(path))])
print(found, flush=True)
os._exit(0)
"""


def test_a_disk_that_is_too_small_for_the_whole_reserve_still_takes_the_ends_of_tasks(tmp_path):
    """Else the next start would tell them once more, and as something else."""
    small, smaller = tmp_path / "small", tmp_path / "smaller"
    small.mkdir()
    smaller.mkdir()
    mounts = f"mount -t tmpfs -o size=4m none {small} && mount -t tmpfs -o size=1m none {smaller}"
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*unshare, mounts], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here: no user namespaces, or no unshare(1)")
    run = f'{mounts} && exec "$0" -c "$1" {small} {smaller}'
    done = subprocess.run([*unshare, run, sys.executable, SMALL_DISK], capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == [[SIZE // 2, True, ["ended"]], [SIZE // 8, True, ["ended"]]]


def test_the_reserve_is_as_large_as_the_disk_allows_and_grows_with_it(tmp_path, monkeypatch):
    now, room = [0.0], [SIZE]
    monkeypatch.setattr(os, "statvfs", lambda path: types.SimpleNamespace(f_bavail=room[0], f_frsize=1))
    path = tmp_path / "r"
    reserve = Reserve(str(path), clock=lambda: now[0])
    reserve.take()
    assert (reserve.size, path.stat().st_size, reserve.given) == (SIZE // 2, SIZE // 2, False)
    assert reserve.give()
    # Not less than was given up: else a disk that fills up again and again would have it dwindle.
    now[0], room[0] = 3.0, SIZE // 2
    assert reserve.given
    now[0], room[0] = 6.0, SIZE
    assert not reserve.given
    now[0], room[0] = 40.0, 4 * SIZE
    assert not reserve.given
    assert reserve.size == path.stat().st_size == SIZE
    path.unlink()
    room[0] = 1000
    none = Reserve(str(path), clock=lambda: now[0])
    none.take()
    assert (none.given, path.exists()) == (True, False)


def test_what_is_not_needed_any_more_is_given_back_at_the_end(tmp_path):
    async def scenario():
        async with opened(tmp_path / "j") as journal:
            for number in range(500):
                journal.write(INSERT, (number, bytes(4096)))
            journal.write("DELETE FROM results", ())

    asyncio.run(scenario())
    assert [path.name for path in tmp_path.iterdir()] == ["j"]
    assert (tmp_path / "j").stat().st_size < 100_000


def test_a_damaged_file_is_put_aside_and_said_so(tmp_path, caplog):
    path = tmp_path / "journal.db"
    path.write_bytes(b"this is no database, but long enough to look at" * 200)

    async def scenario():
        async with opened(path) as journal:
            journal.write(INSERT, (1, b"x"))
            return await journal.synced()

    assert asyncio.run(scenario())
    assert (tmp_path / "journal.db.damaged").read_bytes().startswith(b"this is no database")
    assert "damaged" in caplog.text


async def fill_with_everything(path):
    async with opened(path) as journal:
        tasks = TaskJournal(journal)
        for number in range(20):
            tasks.received(pb.TaskRequest(correlation_id=f"t{number}"))
        for number in range(1, 201):
            journal.write(INSERT, (number, pb.Status(status=f"{number}" * 50).SerializeToString()))
        for number in range(1, 2001):
            journal.write(RECORD, (f"t{number % 20}", number, packed(metric("m" * 200))[1]), vital=False)


async def looked_at(path):
    async with opened(path) as journal:
        (counts,) = await journal.rows(
            "SELECT (SELECT count(*) FROM tasks), (SELECT count(*) FROM results), (SELECT count(*) FROM records)"
        )
        assert len(await TaskJournal(journal).known()) == counts[0]
        return counts


PAGE_SIZE = 4096


def without_pages(data, *numbers):
    for number in numbers:
        data = data[: number * PAGE_SIZE] + os.urandom(PAGE_SIZE) + data[(number + 1) * PAGE_SIZE :]
    return data


@pytest.mark.parametrize(
    ("damage", "least"),
    [
        pytest.param(lambda data: without_pages(data, len(data) // PAGE_SIZE // 2), (20, 200, 1850), id="middle"),
        pytest.param(
            lambda data: without_pages(data, *(len(data) // PAGE_SIZE * part // 10 for part in (5, 7, 9))),
            (20, 180, 1400),
            id="three-places",
        ),
        pytest.param(lambda data: data[: len(data) // 2], (20, 150, 200), id="half"),
        pytest.param(lambda data: os.urandom(100) + data[100:], (20, 200, 2000), id="header"),
        pytest.param(lambda data: without_pages(data, 0), (20, 200, 2000), id="first-page"),
        pytest.param(lambda data: data[:60] + b"    " + data[64:], (20, 200, 2000), id="version"),
    ],
)
def test_what_can_be_read_of_a_damaged_file_is_taken_over_and_told_once(tmp_path, caplog, damage, least):
    path = tmp_path / "journal.db"
    asyncio.run(fill_with_everything(path))
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    (tmp_path / "journal.db.damaged").write_bytes(b"of an earlier time")
    found = asyncio.run(looked_at(path))
    assert all(count >= wanted for count, wanted in zip(found, least, strict=True)), found
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"set aside as {path}.damaged" in line
    assert f"{found[1]} results and statuses, {found[2]} records" in line
    assert "\n" not in line
    assert len((tmp_path / "journal.db.damaged").read_bytes()) >= len(whole) // 2
    caplog.clear()
    assert asyncio.run(looked_at(path)) == found
    assert caplog.records == []
    assert not list(tmp_path.glob("*.copy*"))


def test_a_log_that_was_lost_and_messages_that_are_damaged_are_said(tmp_path, caplog):
    path = tmp_path / "journal.db"

    async def killed():
        journal = Journal(str(path))
        await journal.open()
        journal.write(INSERT, (1, b"\xff\xff\xff"))
        journal.write(RECORD, ("t", 2, b"\xff\xff\xff"), vital=False)
        journal.write(RECORD, ("t", 3, packed(metric("m"))[1]), vital=False)
        await journal.synced()
        for name in os.listdir(tmp_path):
            shutil.copy(tmp_path / name, tmp_path / f"killed-{name}")
        await journal.aclose()

    async def start(name):
        calls = Calls()
        calls.gate.set()
        async with opened(tmp_path / name) as journal:
            outbox = box(calls, journal)
            await outbox.load()
            assert await outbox.drain(5)
            await outbox.aclose()
        return calls.arrived, await looked_at(tmp_path / name)

    asyncio.run(killed())
    (tmp_path / "other-journal.db").write_bytes((tmp_path / "killed-journal.db").read_bytes())
    (tmp_path / "other-journal.db-reserve").touch()
    assert asyncio.run(start("other-journal.db")) == ([], (0, 0, 0))
    assert "journal.db-wal is gone" in caplog.text
    caplog.clear()
    assert asyncio.run(start("killed-journal.db")) == (["m"], (0, 0, 0))
    assert [record.action for record in caplog.records if record.levelname == "ERROR"] == [
        "message_damaged",
        "message_damaged",
        "records_missing",
    ]


@pytest.mark.parametrize("table", ["results", "records", "tasks"])
def test_a_file_of_another_program_is_put_aside(tmp_path, table):
    with contextlib.closing(sqlite3.connect(tmp_path / "journal.db")) as file:
        file.execute(f"CREATE TABLE {table}(id, mine)")

    async def scenario():
        async with opened(tmp_path / "journal.db") as journal:
            journal.write(INSERT, (1, b""))
            assert await journal.synced()

    asyncio.run(scenario())
    assert (tmp_path / "journal.db.damaged").exists()


def test_rows_that_make_no_sense_are_forgotten_and_the_others_are_not(tmp_path, caplog):
    request = pb.TaskRequest(correlation_id="good").SerializeToString()

    async def scenario():
        async with opened(tmp_path / "journal.db") as journal:
            rows = [
                ("stage", "dancing", b"", "", ""),
                ("request", "received", b"\xff\xff", "", ""),
                ("result", "result", pb.TaskRequest(correlation_id="result").SerializeToString(), "", "{"),
                ("bare", "result", pb.TaskRequest(correlation_id="bare").SerializeToString(), "", "{}"),
                ("status", "told", b"", "DANCED", ""),
                ("other", "received", request, "", ""),
                ("good", "received", request, "", ""),
            ]
            for row in rows:
                journal.write("INSERT INTO tasks VALUES(?, 1, ?, ?, ?, '', ?, NULL)", row)
            journal.write("INSERT INTO results VALUES(3, 't', 'NONE', x'00')", ())
            journal.write("INSERT INTO records VALUES('t', 4, 'NONE', x'00')", ())
            journal.write(INSERT, (5, pb.Status(status="s").SerializeToString()))
            assert [task.correlation_id for task in await TaskJournal(journal).known()] == ["good"]
            assert await box(Calls(), journal).load() == 1
            left = "SELECT (SELECT count(*) FROM tasks), (SELECT count(*) FROM records), (SELECT count(*) FROM results)"
            return await journal.rows(left)

    assert asyncio.run(scenario()) == [(1, 0, 1)]
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 7


def test_a_folder_that_is_not_there_is_a_state_error(tmp_path):
    async def scenario():
        await Journal(str(tmp_path / "none" / "j")).open()

    with pytest.raises(StateError, match="cannot be used"):
        asyncio.run(scenario())


def test_a_file_that_this_user_may_not_use_is_a_state_error_and_stays(tmp_path, monkeypatch):
    """Nobody waits for ever for a thread that has died of it."""

    async def scenario():
        await asyncio.wait_for(Journal(str(tmp_path / "j")).open(), 10)

    (tmp_path / "j").mkdir()
    with pytest.raises(StateError, match="j cannot be used: Is a directory"):
        asyncio.run(scenario())
    (tmp_path / "j").rmdir()
    asyncio.run(fill_with_everything(tmp_path / "j"))
    data = (tmp_path / "j").read_bytes()
    # root may write whatever the mode says.
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(StateError, match=f"is not this user's to read and write: it belongs to user {os.geteuid()}"):
        asyncio.run(scenario())
    assert (tmp_path / "j").read_bytes() == data


def test_a_file_of_a_newer_version_is_left_alone(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "j")) as file:
        file.execute("PRAGMA user_version=99")

    async def scenario():
        await Journal(str(tmp_path / "j")).open()

    with pytest.raises(StateError, match="newer"):
        asyncio.run(scenario())
    assert not list(tmp_path.glob("*damaged*"))
