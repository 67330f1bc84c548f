"""Modules that do, while they are imported, what the program that imports them for a task must not do again."""

from __future__ import annotations

import importlib
import sys

import pytest

from scaleout_mp import TaskExecutor, TaskFailed
from scaleout_mp.task import require_not_loading

RUNS_TASKS = """
from scaleout_mp import TaskExecutor
with open({log!r}, "a") as log:
    log.write("imported\\n")
def double(number):
    return 2 * number
with TaskExecutor(start_method={method!r}, echo_output=False) as executor:
    RESULT = executor.submit(double, 1).result(30)
"""
CONNECTS = """
import os
from scaleout_mp import EdgeClient, GrpcEdgeClientRuntime
def double(number):
    return 2 * number
if "MAIN" not in os.environ:
    EdgeClient({runtime}).connect_to_api("http://127.0.0.1:9")
"""


@pytest.mark.parametrize("method", ["template", "spawn"])
def test_a_module_that_runs_tasks_while_it_is_imported_is_told(tmp_path, monkeypatch, method):
    log, name = tmp_path / "log", f"runs_tasks_{method}"
    (tmp_path / f"{name}.py").write_text(RUNS_TASKS.format(log=str(log), method=method))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TaskFailed, match=r"runs tasks while it is imported.*below `if __name__ == \"__main__\":`"):
        importlib.import_module(name)
    # Here, and in the one process that a task asked for: without end, it would be imported in ever more.
    assert log.read_text().count("imported") == 2


@pytest.mark.parametrize("runtime", ["", "runtime=GrpcEdgeClientRuntime()"], ids=["by itself", "with a runtime"])
def test_a_module_that_connects_while_it_is_imported_is_told(tmp_path, monkeypatch, runtime):
    name = f"connects_{'given' if runtime else 'itself'}"
    (tmp_path / f"{name}.py").write_text(CONNECTS.format(runtime=runtime))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MAIN", "1")
    module = importlib.import_module(name)
    try:
        with TaskExecutor(echo_output=False) as executor, pytest.raises(TaskFailed) as caught:
            executor.submit(module.double, 1).result(30)
    finally:
        del sys.modules[name]
    assert "connects" in str(caught.value)
    assert 'below `if __name__ == "__main__":`' in str(caught.value)
    # Who wrote it sees where.
    assert f"{name}.py" in caught.value.report.traceback


def test_what_a_task_does_itself_is_not_meant():
    with TaskExecutor(echo_output=False) as executor:
        assert executor.submit(require_not_loading, "runs tasks").result(20) is None
