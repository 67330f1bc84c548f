"""A user's script under Ctrl-C, SIGTERM and SIGKILL."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from observing import wait_until

from scaleout_mp import ScaleoutModel
from scaleout_mp.localnet import LocalNetworkThread
from scaleout_mp.localnet.events import ClientDisconnected, MetricReceived, TaskReported

SCRIPT = os.path.join(os.path.dirname(__file__), "edge_script.py")


@pytest.fixture
def net(tmp_path):
    with LocalNetworkThread(tmp_path / "net", lost_after=1.0) as network:
        yield network


@contextlib.contextmanager
def script(net, callback="obedient", *, grace=0.5):
    """Run the script until it is connected; what is left of it at the end is killed."""
    environment = {
        **os.environ,
        "SCALEOUT_CLIENT_TASK_POLLING_INTERVAL": "0.1",
        "SCALEOUT_CLIENT_SEND_TELEMETRY": "false",
    }
    process = subprocess.Popen(
        [sys.executable, SCRIPT, net.api_url, callback, str(grace)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    family = []
    try:
        net.wait_for_clients(1, timeout=30)
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.communicate()
        for relative in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                relative.kill()


def start_task(net):
    with ScaleoutModel.from_training_model([np.zeros(3)]) as model:
        model_id = net.add_model(model)
    task = net.issue("script", "Scaleout_ModelUpdate", model_id=model_id)
    net.wait_for(lambda event: isinstance(event, MetricReceived), timeout=15)
    return task


def ends(net):
    return [(event.status, event.response) for event in net.events.of(TaskReported, lambda event: event.done)]


def ended_well(process):
    out, err = process.communicate(timeout=15)
    assert (process.returncode, out) == (0, "ran to its end\n"), err
    return err


def test_sigterm_reports_the_running_task_and_says_goodbye(net):
    with script(net) as process:
        start_task(net)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        ended_well(process)
        assert not any(relative.is_running() for relative in family)
    ((status, response),) = ends(net)
    assert status == "INTERRUPTED"
    assert "shutting down" in response["msg"]
    (goodbye,) = net.events.of(ClientDisconnected)
    assert not goodbye.lost


def test_the_first_ctrl_c_aborts_the_task_and_the_second_ends_the_client(net):
    with script(net) as process:
        task = start_task(net)
        process.send_signal(signal.SIGINT)
        assert task.done(10).response["msg"] == "Aborted by client"
        second = start_task_again(net)
        process.send_signal(signal.SIGINT)
        err = ended_well(process)
    assert "press Ctrl-C again within 5 s" in err
    assert [status for status, _ in ends(net)] == ["INTERRUPTED", "INTERRUPTED"]
    assert second.status == "INTERRUPTED"
    assert not net.events.of(ClientDisconnected)[0].lost


def start_task_again(net):
    seen = len(net.events.of(MetricReceived))
    with ScaleoutModel.from_training_model([np.zeros(3)]) as model:
        task = net.issue("script", "Scaleout_ModelUpdate", model_id=net.add_model(model))
    wait_until(lambda: len(net.events.of(MetricReceived)) > seen, seconds=10, what="the second task")
    return task


def test_ctrl_c_with_nothing_to_do_ends_the_client(net):
    with script(net) as process:
        process.send_signal(signal.SIGINT)
        ended_well(process)
    assert [event.lost for event in net.events.of(ClientDisconnected)] == [False]


def test_a_second_sigterm_does_not_wait_for_the_server(net):
    with script(net, "stubborn") as process:
        start_task(net)
        net.stop_combiner()
        process.send_signal(signal.SIGTERM)
        # The kernel makes one of two signals that come at once: the first must be seen before the second is sent.
        assert "shutting down" in process.stderr.readline()
        before = time.monotonic()
        process.send_signal(signal.SIGTERM)
        ended_well(process)
        assert time.monotonic() - before < 2


def test_a_lost_link_does_not_keep_a_client_for_long(net):
    with script(net) as process:
        start_task(net)
        net.stop_combiner()
        before = time.monotonic()
        process.send_signal(signal.SIGTERM)
        err = ended_well(process)
        assert time.monotonic() - before < 0.5 + 2 + 5 + 2
    assert "may not know that this client ended" in err


def test_sigkill_leaves_no_process(net):
    with script(net, "stubborn") as process:
        start_task(net)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 2
        process.kill()
        process.wait()
        wait_until(
            lambda: not any(relative.is_running() and relative.status() != psutil.STATUS_ZOMBIE for relative in family),
            seconds=1.5,
            what="the end of all its processes",
        )
