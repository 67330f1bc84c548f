"""A session while everything breaks: the combiner restarts, calls fail, downloads break, clients are killed.

CHAOS_SECONDS says for how long, `make chaos` three minutes.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import random
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from programs_at_work import Program

from scaleout_mp import ScaleoutModel
from scaleout_mp.localnet import Fault, LocalNetworkThread, SessionPlan
from scaleout_mp.localnet.events import MetricReceived, RoundFinished, TaskDelivered, TaskReported, UpdateReceived

SECONDS = float(os.environ.get("CHAOS_SECONDS", "15"))
SEED = int(os.environ.get("CHAOS_SEED", "0")) or random.SystemRandom().getrandbits(32)
SCRIPT = Path(__file__).with_name("crash_script.py")
ENVIRONMENT = {
    "SCALEOUT_CLIENT_TASK_POLLING_INTERVAL": "0.2",
    "SCALEOUT_CLIENT_SEND_TELEMETRY": "false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
NAMES = ("one", "two", "three")


class Clients:
    """Three clients, of which one after the other is killed and started again."""

    def __init__(self, net):
        self._net = net
        self._programs = {name: self._start(name) for name in NAMES}
        self._ended = []

    def _start(self, name):
        return Program(SCRIPT, self._net.api_url, env={**ENVIRONMENT, "ID": name})

    def kill_and_start(self, name):
        program = self._programs[name]
        program.kill()
        program.end(seconds=10)
        self._ended.append(program)
        self._programs[name] = self._start(name)

    def require_all(self):
        for name, program in self._programs.items():
            if program.ended:
                pytest.fail(f"client {name} is gone:\n{program.output}")

    def stop(self):
        for program in self._programs.values():
            program.terminate()
        for name, program in self._programs.items():
            assert program.end(seconds=30) == 0, f"{name}:\n{program.output}"

    def close(self):
        for program in [*self._programs.values(), *self._ended]:
            program.__exit__()
            program.require_nothing_left(seconds=3)


def make_trouble(net, clients, chance):
    """Until the time is up: restarts of the combiner and kills of clients, at moments drawn by chance."""
    unavailable = Fault(code=grpc.StatusCode.UNAVAILABLE)
    net.faults.always("*", unavailable, share=0.1)
    net.faults.always("*", Fault(code=grpc.StatusCode.UNAVAILABLE, after=True), share=0.1)
    net.faults.always("Download", Fault(truncate=100), share=0.2)
    end = time.monotonic() + SECONDS
    victims = itertools.cycle(NAMES)
    while time.monotonic() < end:
        time.sleep(chance.uniform(1.0, 3.0))
        net.stop_combiner()
        time.sleep(chance.uniform(0.1, 1.0))
        net.restart_combiner()
        clients.require_all()
        time.sleep(chance.uniform(0.5, 2.0))
        clients.kill_and_start(next(victims))
    net.faults.clear()


def finished(net):
    return [event for event in net.events.of(RoundFinished) if event.status == "FINISHED"]


@pytest.mark.timeout(SECONDS + 150)
def test_nothing_is_lost_whatever_breaks(tmp_path):
    print(f"CHAOS_SEED={SEED}")
    chance = random.Random(SEED)
    with contextlib.ExitStack() as stack:
        net = stack.enter_context(LocalNetworkThread(tmp_path / "net", lost_after=30))
        clients = Clients(net)
        stack.callback(clients.close)
        net.wait_for_clients(3, timeout=60)
        plan = SessionPlan(
            rounds=10_000,
            client_settings={"steps": 40, "pause": 0.005},
            min_updates=1,
            round_timeout=20,
            round_retries=10_000,
            validation_timeout=20,
        )
        with ScaleoutModel.from_training_model([np.zeros(1_000, np.float32)]) as seed:
            session = net.start_session(plan, seed)
            make_trouble(net, clients, chance)
            # What could finish does, now that nothing breaks any more.
            rounds = len(finished(net))
            deadline = time.monotonic() + 60
            while len(finished(net)) < rounds + 2:
                assert not session.done(), session.exception(0)
                assert time.monotonic() < deadline, "\n".join(net.lines()[-20:])
                time.sleep(0.1)
            net.abort_session()
        clients.stop()
    assert_all_arrived(net)


def assert_all_arrived(net):
    runs = collections.defaultdict(dict)
    first = {}
    for event in net.events.of(MetricReceived):
        same = runs[event.client_id, event.metrics["run"]].setdefault(event.timestamp, event)
        # A metric that came twice is the same.
        assert (same.step, same.metrics) == (event.step, event.metrics)
        first.setdefault((event.client_id, event.metrics["run"], event.step), event.monotonic)
    for run in runs.values():
        steps = [run[moment].step for moment in sorted(run)]
        # Whole, or a whole beginning of a run that was cut off.
        assert steps == list(range(len(steps)))
    updates = {}
    for event in net.events.of(UpdateReceived):
        same = updates.setdefault(event.correlation_id, event)
        assert (same.model_update_id, same.meta) == (event.model_update_id, event.meta)
    whole = sum(len(run) for run in runs.values())
    doubles = len(net.events.of(MetricReceived)) - whole
    print(f"{len(updates)} updates, {len(runs)} runs, {whole} metrics, {doubles} doubles")
    # Of the trouble, some at least has reached the clients.
    assert updates
    assert doubles or any(len(run) < 40 for run in runs.values())
    for update in updates.values():
        run = update.client_id, float(update.meta["run"])
        assert len(runs[run]) == update.meta["steps"]
        assert max(first[(*run, step)] for step in range(update.meta["steps"])) <= update.monotonic
    assert_all_ends_told(net, updates)


def assert_all_ends_told(net, updates):
    ends = collections.defaultdict(set)
    held = set()
    for event in net.events.of(TaskReported):
        held.add(event.correlation_id)
        if event.done:
            ends[event.correlation_id].add((event.status, str(event.response)))
    # What the server gave out with an answer that got lost, the client cannot know of.
    assert held <= ends.keys()
    assert all(len(told) == 1 for told in ends.values()), {key: told for key, told in ends.items() if len(told) > 1}
    assert {event.correlation_id for event in net.events.of(TaskDelivered)} >= updates.keys()
    for correlation_id in updates:
        ((status, _),) = ends[correlation_id]
        assert status == "COMPLETED"
