"""What confinement forbids, and what it must leave alone."""

from __future__ import annotations

import os
import resource

import attacks
import programs
import pytest

from scaleout_mp import ConfigError, EndReason, Limits, TaskExecutor
from scaleout_mp.sandbox import probe, process, seccomp


def filter_refused():
    """Why no task can have a system call filter on this machine; None when it can."""
    try:
        base, own = seccomp.build_base([1]), seccomp.build_own(2)
    except OSError as error:
        return error.strerror

    def put_on():
        process.forbid_new_privileges()
        seccomp.install(base)
        seccomp.install(own)

    return probe.refusal(put_on)


REFUSED = filter_refused()
needs_filter = pytest.mark.skipif(REFUSED is not None, reason=f"no system call filter here: {REFUSED}")


@pytest.fixture(scope="module", params=["template", "spawn"])
def executor(request):
    with TaskExecutor(start_method=request.param, sandbox="basic", echo_output=False) as running:
        yield running


@needs_filter
def test_calls_that_no_training_needs_are_forbidden(executor):
    results = executor.submit(attacks.forbidden_calls, os.getpid()).result(20)
    assert results == dict.fromkeys(results, "EPERM")


@needs_filter
def test_supervisor_and_template_are_out_of_reach(executor):
    before = os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0), resource.getrlimit(resource.RLIMIT_NOFILE)
    results = executor.submit(attacks.reach, os.getpid()).result(20)
    assert {what for what, error in results.items() if not error} == set()
    after = os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0), resource.getrlimit(resource.RLIMIT_NOFILE)
    assert after == before
    assert executor.submit(programs.echo, 1).result(20) == 1


def test_ordinary_work_goes_on(executor):
    done = executor.submit(attacks.ordinary_work).result(60)
    assert done == [True] * len(done)


def test_scikit_learn_and_joblib_work(executor):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    accuracy, squares = executor.submit(attacks.fit_forest).result(60)
    assert accuracy > 0.95
    assert squares == [0, 1, 4, 9, 16]


def test_pytorch_with_data_loader_workers_works(executor):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from attacks_torch import train_with_workers

    assert executor.submit(train_with_workers).result(90) < 1.0


@needs_filter
def test_levels():
    for sandbox, expected in (("auto", "2"), ("basic", "2"), ("none", "0")):
        with TaskExecutor(sandbox=sandbox, echo_output=False) as running:
            facts = running.submit(attacks.privileges).result(20)
        assert facts == {"NoNewPrivs": "0" if sandbox == "none" else "1", "Seccomp": expected}


def test_an_unknown_level_is_named():
    with pytest.raises(
        ConfigError, match="sandbox must be one of 'auto', 'none', 'basic', 'strict', or a Sandbox, not 'very'"
    ):
        TaskExecutor(sandbox="very")


def test_a_family_with_a_filter_is_gone_all_the_same(executor, tmp_path):
    task = executor.submit(programs.hang_with_family, str(tmp_path / "pids"), limits=Limits(abort_grace=0.2))
    next(task.records())
    task.abort()
    assert task.report(20).reason is EndReason.INTERRUPTED_BY_CLIENT


def test_a_probe_says_why_something_is_refused():
    assert probe.refusal(lambda: None) is None
    assert probe.refusal(lambda: os.kill(os.getpid(), 9)) == "it died of signal 9"

    def fail():
        raise OSError(1, "not allowed")

    assert probe.refusal(fail) == "PermissionError: [Errno 1] not allowed"
