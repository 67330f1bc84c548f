"""What is wrong is said at once, and whatever goes wrong later still ends in a report."""

from __future__ import annotations

import asyncio
import dataclasses

import programs
import psutil
import pytest

from scaleout_mp import ConfigError, EndReason, Limits, TaskExecutor
from scaleout_mp.executor.core import ExecutorCore
from scaleout_mp.ipc import arguments, callables


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("limits", 5),
        ("limits", {"memory": "1GiB"}),
        ("resources", 5),
        ("preload", "numpy"),
        ("preload", None),
        ("preload", [5]),
        ("preload", [""]),
        ("echo_output", "no"),
        ("shield", "yes"),
        ("gpus", ["0\0"]),
        ("environment", 0),
        ("environment", {"A": "\ud800"}),
        ("environment", {"\ud800": "a"}),
        ("pass_environment", None),
        ("pass_environment", [5]),
        ("state_bytes", "1" + "0" * 400),
        ("memory_budget", "1" + "0" * 400),
        ("max_concurrent_tasks", 0),
    ],
)
def test_a_wrong_option_of_an_executor_names_its_field(field, value):
    with pytest.raises(ConfigError, match=field):
        TaskExecutor(**{field: value})


@pytest.fixture(scope="module")
def executor():
    with TaskExecutor(echo_output=False) as running:
        yield running


@pytest.mark.parametrize(
    ("field", "value"),
    [("limits", {"memory": "1GiB"}), ("limits", 0), ("resources", 5), ("name", 5), ("state", 5), ("state", "")],
)
def test_a_wrong_option_of_a_task_names_its_field(executor, field, value):
    with pytest.raises(ConfigError, match=f"^{field} must be"):
        executor.submit(abs, -1, **{field: value})
    assert executor.submit(abs, -1).result(20) == 1


@pytest.mark.parametrize("field", ["limits", "resources"])
def test_a_wrong_option_of_a_worker_names_its_field(executor, field):
    with pytest.raises(ConfigError, match=f"^{field} must be"):
        executor.worker("w", **{field: 5})


def test_bytes_that_are_no_text_reach_a_task_as_they_are():
    with TaskExecutor(echo_output=False, environment={"A": "\udc80"}) as running:
        assert running.submit(eval, "ascii(__import__('os').environ['A'])").result(20) == r"'\udc80'"


class Mistake(Exception):
    """Nobody expects it."""


def mistaken(*_):
    raise Mistake("of this program")


async def reports_of(prepare, submit):
    """Return the report of a task that `submit` orders, and of a usual one after it."""
    core = ExecutorCore(echo_output=False)
    await core.start()
    try:
        undo = prepare(core)
        first = (await asyncio.wait_for(submit(core).outcome(), 20)).report
        undo()
        after = (await asyncio.wait_for(core.submit(abs, -1).outcome(), 20)).report
        await asyncio.wait_for(core.wait_idle(), 20)
    finally:
        await core.aclose(kill=True)
    assert after.completed
    return first


def replace_start(core, start):
    launcher = core._launcher
    usual = launcher.start
    launcher.start = lambda order: start(usual, order)

    def undo():
        launcher.start = usual

    return undo


def test_a_mistake_before_the_start_is_in_the_report(caplog):
    report = asyncio.run(reports_of(lambda core: replace_start(core, mistaken), lambda core: core.submit(abs, -1)))
    assert (report.reason, report.message) == (EndReason.REFUSED, "cannot run a task: Mistake: of this program")
    assert "a task could not be run" in caplog.text


def test_a_mistake_while_it_runs_ends_the_task():
    started = []

    def start(usual, order):
        child = usual(order)
        broken = dataclasses.replace(child, exited=asyncio.get_running_loop().create_future())

        def fail(done):
            started.append(psutil.Process(done.result().pid))
            broken.exited.set_exception(Mistake("of this program"))

        child.started.add_done_callback(fail)
        return broken

    report = asyncio.run(
        reports_of(lambda core: replace_start(core, start), lambda core: core.submit(programs.sleep_in_c))
    )
    assert (report.reason, report.message) == (EndReason.CRASHED, "cannot run a task: Mistake: of this program")
    assert len(started) == 1
    assert psutil.wait_procs(started, timeout=10)[1] == []


def unchecked(core, **options):
    return core.submit_packed(callables.prepare(abs), arguments.pack((-1,), {}), **options)


@pytest.mark.parametrize("options", [{"limits": 5}, {"resources": 5}])
def test_what_cannot_even_be_reported_has_an_outcome(options):
    report = asyncio.run(reports_of(lambda _: lambda: None, lambda core: unchecked(core, **options)))
    assert report.reason is EndReason.REFUSED
    assert report.message.startswith("cannot run a task: AttributeError")


def test_a_listener_that_fails_costs_the_task_nothing(caplog):
    report = asyncio.run(
        reports_of(
            lambda _: lambda: None,
            lambda core: core.submit(abs, -1, limits=Limits(), on_state=mistaken, on_record=mistaken),
        )
    )
    assert report.completed
    assert caplog.text.count("a state could not be passed on") == 3
