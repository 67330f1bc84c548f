"""The link's quality, the progress of models, and how both are shown."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaleout_mp.cli.status_view import lines
from scaleout_mp.transport.link import LinkWatch
from scaleout_mp.transport.link_quality import LinkQuality, LinkState
from scaleout_mp.transport.progress import Progress


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def quality(clock):
    return LinkQuality(clock)


def feed(quality, seconds, times):
    for _ in range(times):
        quality.measured(seconds)


def test_one_slow_call_changes_nothing_and_several_in_a_row_degrade(quality):
    feed(quality, 0.01, 10)
    quality.measured(60.0)
    assert quality.state is LinkState.HEALTHY
    feed(quality, 2.0, 20)
    assert quality.state is LinkState.DEGRADED
    assert quality.round_trip == 2.0


def test_it_takes_three_bad_looks_and_five_good_ones(quality):
    feed(quality, 2.0, 2)
    assert quality.state is LinkState.HEALTHY
    quality.measured(2.0)
    assert quality.state is LinkState.DEGRADED
    # The median turns once most of the window is quick; then five looks.
    feed(quality, 0.1, 3 + 1 + 3)
    assert quality.state is LinkState.DEGRADED
    quality.measured(0.1)
    assert quality.state is LinkState.HEALTHY


@given(st.lists(st.floats(0.5, 1.5), max_size=60))
def test_between_the_bounds_nothing_changes(trips):
    healthy, degraded = LinkQuality(), LinkQuality()
    feed(degraded, 9.0, 20)
    for trip in trips:
        healthy.measured(trip)
    # Once the window holds nothing else.
    for trip in trips:
        degraded.measured(trip)
    assert healthy.state is LinkState.HEALTHY
    assert degraded.state is LinkState.DEGRADED


@given(st.lists(st.sampled_from([0.1, 1.0, 9.0]), max_size=200))
def test_it_never_flips_within_three_looks(trips):
    quality = LinkQuality()
    last, since = quality.state, 10
    for trip in trips:
        quality.measured(trip)
        since += 1
        if quality.state is not last:
            assert since >= 3
            last, since = quality.state, 0


def test_silence_degrades_only_when_it_is_long(quality, clock):
    clock.now = 29.0
    quality.failed()
    assert quality.state is LinkState.HEALTHY
    clock.now = 30.0
    quality.failed()
    assert quality.state is LinkState.DEGRADED
    quality.answered()
    feed(quality, 0.1, 4)
    quality.failed()
    feed(quality, 0.1, 4)
    assert quality.state is LinkState.DEGRADED
    quality.measured(0.1)
    assert quality.state is LinkState.HEALTHY


def test_a_channel_that_fails_degrades_at_once_and_heals_by_answers_alone(quality):
    feed(quality, 0.1, 10)
    quality.channel(failing=True)
    assert quality.state is LinkState.DEGRADED
    feed(quality, 0.1, 10)
    assert quality.state is LinkState.DEGRADED
    quality.channel(failing=False)
    quality.measured(0.1)
    assert quality.state is LinkState.HEALTHY


def test_changes_are_said_once(quality, caplog):
    caplog.set_level(logging.INFO)
    feed(quality, 2.0, 9)
    assert caplog.messages == ["the link is degraded: a round trip takes 2.0 s"]


def test_the_watch_of_the_link_feeds_it(clock):
    link = LinkWatch(clock)
    clock.now = 31.0
    link.failed("a call", OSError("gone"), 1.0)
    assert link.quality.state is LinkState.DEGRADED
    assert link.outages == 1


def test_progress_is_said_every_ten_seconds_and_ten_percent(clock, caplog):
    caplog.set_level(logging.INFO)
    progress = Progress("uploaded", "m", 1_000_000_000, clock=clock)
    for _ in range(800):
        clock.now += 0.125
        progress.add(1_250_000)
    progress.finish()
    said = [message.split(", ")[1] for message in caplog.messages]
    assert said == ["10%", "20%", "30%", "40%", "50%", "60%", "70%", "80%", "90%", "100%", "done"]
    assert caplog.messages[0] == "model m uploaded: 100.0 MB, 10%, 10.0 MB/s"


def test_progress_of_a_quick_transfer_is_not_said_and_one_of_unknown_size_is(clock, caplog):
    caplog.set_level(logging.INFO)
    quick = Progress("downloaded", "m", clock=clock)
    quick.add(5)
    clock.now = 9.0
    quick.finish()
    assert (quick.done, quick.total, caplog.messages) == (5, 5, [])
    slow = Progress("downloaded", "m", clock=clock)
    clock.now = 20.0
    slow.add(11_000_000)
    assert caplog.messages == ["model m downloaded: 11.0 MB, so far, 1.0 MB/s"]
    slow.again()
    assert slow.done == 0


def seen(**said):
    task = {
        "correlation_id": "c",
        "type": "t",
        "phase": "uploading",
        "process_state": None,
        "seconds": 3.2,
        "memory_limit": None,
        "memory_now": 0,
        "last_metrics": {},
        "last_step": None,
        "moved": 1 << 20,
        "to_move": 4 << 20,
    }
    client = {"name": "n", "client_id": "i", "pid": 1, "pending_messages": 0, "deaths": [], "connected": True}
    client |= {"dropped_messages": 0, "refused_messages": 0}
    return {**client, "link": "degraded", "round_trip": 0.25, "tasks": [task], **said}


def test_the_status_shows_link_and_progress():
    first, second = lines(seen())
    assert first == "client n (i), pid 1: connected, link degraded (round trip 250 ms), 0 messages wait"
    assert second == "task c t: uploading, 3 s, 0 B  1.0 MiB of 4.0 MiB (25%)"
    assert "no connection, 0 messages" in lines(seen(connected=False))[0]
    unknown = seen(round_trip=None)
    unknown["tasks"][0]["to_move"] = None
    assert lines(unknown) == [
        "client n (i), pid 1: connected, link degraded, 0 messages wait",
        "task c t: uploading, 3 s, 0 B  1.0 MiB",
    ]
