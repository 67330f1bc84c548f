"""What confinement forbids, and what it must leave alone."""

from __future__ import annotations

import os
import resource

import attacks
import programs
import pytest

from scaleout_mp import ConfigError, EndReason, Limits, Sandbox, TaskExecutor
from scaleout_mp.sandbox import landlock, probe, process, seccomp


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


def domain_refused():
    """Why no task can be kept from signalling processes outside; None when it can."""

    def restrict():
        process.forbid_new_privileges()
        with landlock.Ruleset() as rules:
            rules.restrict()

    refused = probe.refusal(restrict)
    if refused is None and landlock.abi() < landlock.SCOPES_SINCE:
        return f"Landlock is of version {landlock.abi()}"
    return refused


NO_DOMAIN = domain_refused()
needs_domain = pytest.mark.skipif(NO_DOMAIN is not None, reason=f"no Landlock for signals here: {NO_DOMAIN}")

REFUSED = filter_refused()
needs_filter = pytest.mark.skipif(REFUSED is not None, reason=f"no system call filter here: {REFUSED}")


LEVELS = [("template", "basic"), ("template", "auto"), ("template", "strict"), ("spawn", "strict")]


@pytest.fixture(scope="module", params=LEVELS, ids="-".join)
def executor(request, tmp_path_factory):
    start_method, level = request.param
    sandbox = Sandbox(level="strict", write=[tmp_path_factory.getbasetemp()]) if level == "strict" else level
    with TaskExecutor(start_method=start_method, sandbox=sandbox, echo_output=False) as running:
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


def test_numpy_works(executor):
    assert executor.submit(attacks.fit_line).result(60) < 1e-6


def test_joblib_with_multiprocessing_works(executor):
    pytest.importorskip("joblib", reason="joblib is not installed")
    total = 500_000 * 499_999 / 2
    assert sum(executor.submit(attacks.fit_in_processes).result(60)) == total


def test_pytorch_with_data_loader_workers_works(executor):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from attacks_torch import train_with_workers

    assert executor.submit(train_with_workers).result(90) < 1.0


@needs_filter
def test_levels():
    for sandbox, expected in (("auto", "2"), ("basic", "2"), ("none", "0"), ("strict", "2")):
        with TaskExecutor(sandbox=sandbox, echo_output=False) as running:
            facts = running.submit(attacks.privileges).result(20)
        assert facts == {"NoNewPrivs": "0" if sandbox == "none" else "1", "Seccomp": expected}


@needs_domain
@pytest.mark.parametrize("level", ["auto", "strict"])
def test_no_process_outside_is_within_reach(level):
    with TaskExecutor(sandbox=level, echo_output=False) as running:
        results = running.submit(attacks.reach_by_any_means, os.getpid()).result(20)
    assert {what for what, error in results.items() if not error} == set()


@pytest.mark.parametrize("level", ["none", "basic", "auto", "strict"])
def test_the_template_cannot_be_poisoned(level):
    if level != "none" and REFUSED is not None:
        pytest.skip(f"no system call filter here: {REFUSED}")
    with TaskExecutor(sandbox=level, echo_output=False) as running:
        if level == "none":
            # Nothing is promised but what a fork gives away by itself.
            shared, own = running.submit(attacks.given_by_the_fork).result(20)
        else:
            attempts, shared, own = running.submit(attacks.poison).result(20)
            if os.geteuid() == 0 and level != "strict":
                # A file of root's, which tasks of root may write, see docs/security.md.
                del attempts["spare its life for last"]
            assert {what for what, error in attempts.items() if not error} == set()
        # Streams, channel, stacks, and the folder that is being listed: nothing of the template's.
        assert shared == []
        assert set(own) <= {0, 1, 2, 3, 4, 5}
        template = running.submit(os.getppid).result(20)
        assert running.submit(os.getppid).result(20) == template


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
