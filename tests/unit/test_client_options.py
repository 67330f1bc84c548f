"""Options of `scaleout-mp client start`, and what the runtime makes of them."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os

import click
import pytest

from scaleout_mp.cli.app import run
from scaleout_mp.cli.client_options import client_options, given_options
from scaleout_mp.cli.client_runtime import runtime_options
from scaleout_mp.config import Settings
from scaleout_mp.config.settings import VARIABLES
from scaleout_mp.errors import ConfigError
from scaleout_mp.supervisor.runtime import GrpcEdgeClientRuntime

FILE = """
read: [/etc/hosts]
sandbox: strict
network: true
inference_concurrency: 3
inference-memory: 512MiB
env:
  - A=1
  - B=2
nice: 5
"""


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in os.environ:
        if name.startswith("SCALEOUT_"):
            monkeypatch.delenv(name)


def given(*arguments):
    seen = []

    @click.command
    @client_options
    @click.pass_context
    def probe(ctx, /, **values):
        seen.append(given_options(ctx, values))

    probe.main(list(arguments), standalone_mode=False)
    return seen[0]


def test_without_options_the_runtime_is_as_it_is_by_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    by_options = GrpcEdgeClientRuntime(**runtime_options(given()))._plan_options
    assert by_options == GrpcEdgeClientRuntime()._plan_options


def test_each_argument_of_the_runtime_can_be_given():
    # Of which client and package it is the program says; the rest are variables, and so in `settings`.
    others = {"self", "client", "package", "settings", "trusted_signers"}
    everything = given("--scratch-folder", "/tmp", "--working-directory", "inherit", "--state-dir", ":memory:")
    everything.values.update(state_bytes="1MiB", memory_budget="1GiB", max_concurrent_tasks=2, goodbye_seconds="1s")
    assert (
        set(runtime_options(everything)) == set(inspect.signature(GrpcEdgeClientRuntime.__init__).parameters) - others
    )
    assert set(VARIABLES) == {field.name for field in dataclasses.fields(Settings)}


def test_what_was_given_is_in_effect(tmp_path, monkeypatch):
    (tmp_path / "client.yaml").write_text(FILE)
    monkeypatch.setenv("SCALEOUT_MP_PASS_ENV", "HTTP_PROXY LANG")
    monkeypatch.setenv("SCALEOUT_MP_INFERENCE_IDLE_TIME", "never")
    flags = ("--memory", "1GiB", "--wall-time", "10m", "--inference-wall-time", "5", "--memory-budget", "0.5")
    others = ("--gpus", "0,1", "--gpus-per-task", "1", "--heartbeat-interval", "500", "--hide-output", "--no-shield")
    options = given("--init", str(tmp_path / "client.yaml"), *flags, *others)
    plan = GrpcEdgeClientRuntime(**runtime_options(options))._plan_options
    assert (plan.inference.processes, plan.inference.idle_seconds) == (3, None)
    assert (plan.inference.limits.memory, plan.inference.limits.seconds("wall_time")) == ("512MiB", 5.0)
    assert (plan.limits.memory, plan.limits.seconds("wall_time")) == ("1GiB", 600.0)
    assert plan.memory_budget > 1 << 30
    assert (plan.sandbox.level, plan.sandbox.read, plan.sandbox.network) == ("strict", ("/etc/hosts",), True)
    assert (plan.gpus, plan.resources.gpus, plan.resources.nice) == (("0", "1"), 1, 5)
    assert plan.surroundings.environment == {"A": "1", "B": "2"}
    assert tuple(plan.surroundings.pass_environment) == ("HTTP_PROXY", "LANG")
    assert (plan.surroundings.shield, plan.echo_output, plan.heartbeat_interval) == (False, False, 500.0)
    sources = {name: options.sources[name] for name in ("read", "inference_idle_time", "memory", "isolation")}
    assert sources == {"read": "file", "inference_idle_time": "variable", "memory": "flag", "isolation": "default"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--inference-idle-time", "soon"), "inference_idle_time must be"),
        (("--inference-memory", "1"), "memory must be at least"),
        (("--read", "/etc/hosts"), 'read, write and network are for level "strict"'),
        (("--gpus-per-task", "1"), "it wants 1 GPUs, and there are 0"),
        (("--nice", "50"), "nice must be"),
        (("--affinity", "x"), "affinity must be numbers"),
        (("--env", "A"), "say NAME=VALUE"),
        (("--heartbeat-interval", "0"), "heartbeat_interval must be above 0"),
    ],
)
def test_a_wrong_value_names_what_is_wrong(arguments, says):
    with pytest.raises(ConfigError, match=says):
        GrpcEdgeClientRuntime(**runtime_options(given(*arguments)))


def test_config_shows_variables_that_are_no_options_and_no_secrets(monkeypatch, capsys):
    monkeypatch.setenv("SCALEOUT_GRPC_SECURE", "false")
    assert run(["config", "--env", "KEY=secret", "--json"]) == 0
    out = capsys.readouterr().out
    shown = json.loads(out)
    assert shown["SCALEOUT_GRPC_SECURE"] == {"value": False, "source": "variable"}
    assert shown["SCALEOUT_MP_MAX_MODEL_SIZE"]["source"] == "default"
    # It is an option as well.
    assert "SCALEOUT_MP_STATE_DIR" not in shown
    assert shown["env"] == {"value": ["KEY=(set)"], "source": "flag"}
    assert "secret" not in out
    assert run(["config", "--env", "KEY=secret"]) == 0
    assert "KEY=(set)" in capsys.readouterr().out
