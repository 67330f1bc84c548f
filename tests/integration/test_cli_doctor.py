"""`scaleout-mp doctor` as its users run it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from scaleout_mp.config.sandbox import Level
from scaleout_mp.doctor import trial
from scaleout_mp.doctor.advice import advise
from scaleout_mp.doctor.machine import Offer

DOCTOR = (sys.executable, "-m", "scaleout_mp", "doctor")


@pytest.fixture(scope="module")
def diagnosis():
    done = subprocess.run([*DOCTOR, "--json"], check=False, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_this_machine_offers(diagnosis):
    offers = {offer["key"]: offer for offer in diagnosis["machine"]}
    assert {"kernel", "landlock", "seccomp", "user_namespace", "memory_cgroup", "pidfd", "yama"} <= set(offers)
    assert all(offer["value"] for offer in offers.values())
    assert offers["pidfd"]["good"]
    for key in ("landlock", "seccomp", "mount_namespace"):
        # What is not there says why.
        assert offers[key]["good"] or ":" in offers[key]["value"] or "no say" in offers[key]["value"]


def test_a_task_was_asked_at_each_level(diagnosis):
    offers = {offer["key"]: offer["good"] for offer in diagnosis["machine"]}
    levels = {finding["level"]: finding for finding in diagnosis["levels"]}
    assert list(levels) == [level.value for level in Level]
    assert diagnosis["isolated"]
    for name, finding in levels.items():
        assert finding["problem"] is None
        assert set(finding["can"]) == set(trial.ATTEMPTS)
        assert finding["status"]["NoNewPrivs"] == ("0" if name == "none" else "1")
        assert finding["limits"]["core"] == 0
        assert finding["seconds"] > 0
    assert levels["none"]["can"]["see_secrets"]
    assert not any(levels[name]["can"]["see_secrets"] for name in ("basic", "auto", "strict"))
    if offers["landlock"]:
        assert not levels["auto"]["can"]["memory"]
        assert not levels["auto"]["can"]["signal"]
        assert not levels["strict"]["can"]["read"]
        assert not levels["strict"]["can"]["write"]
    if offers["mount_namespace"] and offers["network_namespace"]:
        assert not any(levels["strict"]["can"].values())
        assert {"net", "ipc", "mnt"} <= set(levels["strict"]["own_namespaces"])
    if offers["seccomp"]:
        assert levels["auto"]["status"]["Seccomp"] == "2"


def test_what_is_shown_to_people():
    done = subprocess.run(DOCTOR, check=False, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0
    for title in ("This machine", "What a task can do, at each level", 'In force at level "strict"', "To get more"):
        assert title in done.stdout
    assert "\x1b" not in done.stdout
    assert "Traceback" not in done.stderr


def test_nothing_can_be_isolated():
    # No room for the mark of a task's tree: no task can run, which is the one thing that counts as failure.
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_RTTIME, (1, 1)); "
    run = "from scaleout_mp.cli.app import run; sys.exit(run(['doctor']))"
    command = [sys.executable, "-c", limited + run]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=110)
    assert done.returncode == 1
    assert "no task can be started" in done.stdout


def test_advice_is_for_what_is_lacking():
    assert advise([Offer(key="landlock", name="", value="", good=True)]) == []
    lacking = ("landlock", "memory_cgroup", "user_namespace", "shared_memory")
    advice = advise([Offer(key=key, name="", value="", good=False) for key in lacking])
    assert [each.key for each in advice] == ["landlock", "memory_cgroup", "shared_memory", "namespaces"]
    assert any("Delegate" in line for line in advice[1].how)
    assert all(each.what and each.how for each in advice)
