"""What a task finds of the program around it: its environment, descriptors and session."""

from __future__ import annotations

import os

import pytest
import scratch_programs as programs
from observing import open_descriptors

from scaleout_mp import TaskExecutor
from scaleout_mp.sandbox import process
from scaleout_mp.sandbox.shield import Shield

LEVELS = ("none", "basic", "auto", "strict")
SECRETS = {"SCALEOUT_TOKEN": "s3cret", "FEDN_AUTH_TOKEN": "s3cret", "AWS_SECRET_ACCESS_KEY": "s3cret"}


@pytest.fixture(params=["template", "spawn"])
def start_method(request):
    return request.param


@pytest.fixture
def secrets(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HTTPS_PROXY", "http://ada:s3cret@proxy:1")
    monkeypatch.setenv("WANDB_MODE", "offline")


def test_no_secret_is_anywhere_in_a_task(secrets, start_method):
    with TaskExecutor(
        sandbox="basic",
        start_method=start_method,
        echo_output=False,
        pass_environment=["WANDB_*"],
        environment={"A": "b"},
    ) as executor:
        seen = executor.submit(programs.look_for_secrets).result(20)
    assert [place for place, environment in seen.items() if environment is None] in ([], ["template's /proc"])
    for place, environment in seen.items():
        if environment is None:
            continue
        assert not [entry for entry in environment if "s3cret" in entry], place
        assert "HTTPS_PROXY=http://proxy:1" in environment
        assert "WANDB_MODE=offline" in environment
        assert "A=b" in environment
        assert f"PATH={os.environ['PATH']}" in environment


def test_level_none_passes_all(secrets, start_method):
    with TaskExecutor(
        sandbox="none", start_method=start_method, echo_output=False, environment={"WANDB_MODE": "online"}
    ) as executor:
        seen = executor.submit(programs.look_for_secrets).result(20)
    assert {f"{name}={value}" for name, value in SECRETS.items()} <= set(seen["os.environ"])
    assert "WANDB_MODE=online" in seen["os.environ"]


@pytest.mark.parametrize("level", LEVELS)
def test_a_shielded_program_cannot_be_read(secrets, level):
    before = process.is_dumpable()
    with TaskExecutor(sandbox=level, echo_output=False, shield=True) as executor:
        seen = executor.submit(programs.spy, os.getpid()).result(20)
        assert not process.is_dumpable()
    assert process.is_dumpable() == before
    may_trace = seen.pop("may trace")
    # Root reads what it likes as long as it has this capability.
    readable = {name for name, error in seen.items() if not error}
    assert readable == (set(seen) if may_trace else set())


def test_shields_add_up():
    before = process.is_dumpable()
    first, second = Shield(), Shield()
    first.put_on()
    first.put_on()
    second.put_on()
    first.take_off()
    first.take_off()
    assert not process.is_dumpable()
    second.take_off()
    assert process.is_dumpable() == before


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_else_is_open_and_the_session_is_its_own(level, start_method):
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    try:
        with TaskExecutor(sandbox=level, start_method=start_method, echo_output=False) as executor:
            seen = executor.submit(programs.look_at_process).result(20)
    finally:
        os.close(reader)
        os.close(writer)
    assert set(seen["descriptors"]) == {0, 1, 2, 3, 4}
    assert seen["session"] == seen["group"] == seen["pid"]
    assert seen["oom_score_adj"] == 1000
    assert seen["core"] == (0, 0)
    assert open_descriptors().keys().isdisjoint({reader, writer})
