"""A link that is down for ten minutes of the client's time, during training."""

from __future__ import annotations

import functools
import itertools
import logging
import time

import edge_callbacks as callbacks
import numpy as np
import pytest
from edge_running import RunningClient
from fast_clock import FastLoop
from observing import wait_until

from scaleout_mp import ScaleoutModel
from scaleout_mp.config import Settings
from scaleout_mp.localnet import LocalNetworkThread
from scaleout_mp.localnet.events import MetricReceived, TaskReported, UpdateReceived

#: Seconds of the client in one of ours.
RATE = 100
OUTAGE = 600.0


@pytest.fixture
def net(tmp_path):
    with LocalNetworkThread(tmp_path / "net") as network:
        yield network


def test_ten_minutes_without_a_link_cost_a_training_nothing(net, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    until = tmp_path / "until"
    with ScaleoutModel.from_training_model([np.zeros(1_000, np.float32)]) as model:
        model_id = net.add_model(model)
    settings = Settings(polling_interval=5.0, send_telemetry=False)
    edge = RunningClient(net, settings=settings, run={"with_heartbeat": True})
    edge.runtime._loop_factory = functools.partial(FastLoop, RATE)
    with edge:
        edge.client.set_train_callback(callbacks.Worker(edge.client).train_until)
        task = edge.issue(model_id=model_id, settings={"until": str(until)})
        net.wait_for(lambda event: isinstance(event, MetricReceived), timeout=20)
        net.stop_combiner()
        begun = time.monotonic()
        wait_until(lambda: edge.client.link_quality == "degraded", what="the outage's being noticed")
        waiting = edge.runtime.snapshot().pending_messages
        wait_until(lambda: time.monotonic() - begun > OUTAGE / RATE, seconds=OUTAGE, what="ten minutes")
        # The task has gone on, and nothing has arrived.
        assert edge.runtime.snapshot().pending_messages > waiting + 100
        until.touch()
        wait_until(lambda: edge.runtime.snapshot().tasks[0].phase == "uploading", seconds=20, what="the training's end")
        net.restart_combiner()
        assert task.done(60).completed
    (update,) = net.events.of(UpdateReceived)
    meta = update.meta
    assert meta["slowest_log"] < 0.25
    # All is there, once each but for what was under way when the link broke, and in order by its time stamps.
    seen = {(event.timestamp, event.step) for event in net.events.of(MetricReceived)}
    assert [step for _, step in sorted(seen)] == list(range(meta["steps"]))
    ends = [event.status for event in net.events.of(TaskReported) if event.done]
    assert [status for status, _ in itertools.groupby(ends)] == ["COMPLETED"]
    (away,) = [record.args[0] for record in caplog.records if getattr(record, "action", "") == "link_restored"]
    assert away > 0.9 * OUTAGE
