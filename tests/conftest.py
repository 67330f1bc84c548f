"""What every test gets: a check that it left no process behind."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import time

import pytest
from observing import children

_NUMBERS = itertools.count()

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As where a shell or a CI runs the tests in the background: programs that the tests start would ignore it as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def state_of_its_own(tmp_path_factory, monkeypatch):
    """Keep what clients keep out of the user's home, and out of other tests."""
    # With a number of our own: pytest finds one by reading the folder, in which each test has one.
    folder = tmp_path_factory.mktemp(f"state-{next(_NUMBERS)}", numbered=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(folder))


@pytest.fixture(autouse=True)
def no_process_left():
    """Fail a test that leaves a process behind."""
    before = children()
    yield
    deadline = time.monotonic() + 3
    while left := {pid: command for pid, command in children().items() if pid not in before}:
        if time.monotonic() > deadline:
            pytest.fail(f"processes are left: {left}")
        time.sleep(0.01)


#: Tests that take ten seconds and more.
LONG = (
    "test_every_fault_as_an_ordinary_user",
    "test_all_comes_out_as_planned",
    "test_an_environment_is_built_once_and_anew_when_it_is_broken",
    "test_nothing_is_lost_whatever_breaks",
    "test_two_demos_at_once_do_not_meet_and_top_shows_both",
    "test_a_burst_of_metrics_before_a_sigkill_arrives_whole",
    "test_ten_thousand_short_tasks",
    "test_scikit_learn_as_a_package_and_as_a_script",
    "test_numpy_digits",
)


def pytest_collection_modifyitems(config, items):
    """Leave out what `make test-all` has beside: variants that take long and seldom tell more than their siblings.

    Long tests come first: begun last, one would keep the other process of `make test` waiting for its end.
    """
    items.sort(key=lambda item: item.originalname not in LONG)
    if os.environ.get("SCALEOUT_MP_ALL_TESTS"):
        return
    extra = [item for item in items if _is_extra(item)]
    if extra:
        config.hook.pytest_deselected(items=extra)
        items[:] = [item for item in items if item not in set(extra)]


def pytest_collection_finish():
    """Have garbage collections look at what tests make alone: thousands of items and modules are there to stay."""
    gc.collect()
    gc.freeze()


def _is_extra(item):
    folder, file = item.path.parent.name, item.path.name
    variant = item.name.partition("[")[2]
    if folder == "contract" and file != "test_executor.py":
        return "spawn" in variant
    if file == "test_published_client.py" and "OurClient" in variant:
        # Ours does the same in other tests; here it takes ten seconds of waiting for polls.
        return True
    if file == "test_first_look.py" and "plain_installation" in item.name:
        # It installs all that the demo needs, twice.
        return True
    return file == "test_package_environment.py" and "pip" in variant and "built_once" not in item.name
