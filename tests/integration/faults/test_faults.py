"""Every fault, at the levels that are asked for: the supervisor must not care, and the report must be right."""

from __future__ import annotations

import os
import tempfile

import pytest
from fault_catalogue import all_faults
from fault_stage import Stage, levels, modules_to_preload

from scaleout_mp import Sandbox, TaskExecutor
from scaleout_mp.config.sandbox import Level
from scaleout_mp.executor import execution

FAULTS = all_faults()


# `make faults` performs all at all levels, as both users; `make test` has the default.
@pytest.fixture(scope="module", params=levels([Level.AUTO.value]))
def stage(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"faults-{request.param}")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("temp", "work", "faults"):
            (folder / name).mkdir()
        patch.setenv("TMPDIR", str(folder / "temp"))
        patch.setattr(tempfile, "tempdir", None)
        patch.chdir(folder / "work")
        # What a task gets for threads and exit handlers after its result: the suite has many that use it up.
        patch.setattr(execution, "EXIT_GRACE", 0.3)
        faults = folder / "faults"
        # What a fault leaves for the suite to look at must be within its reach.
        sandbox = Sandbox(write=[faults]) if request.param == Level.STRICT else request.param
        with TaskExecutor(sandbox=sandbox, preload=modules_to_preload(), echo_output=False) as executor:
            stage = Stage(request.param, executor, faults)
            yield stage
            stage.close()


@pytest.fixture(autouse=True)
def no_process_left():
    """Stand in for the check of all other tests: a fault may cost the template, and the stage counts processes."""


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(stage, fault):
    missing = None if fault.needs is None else fault.needs(stage)
    if missing is not None:
        pytest.skip(missing)
    stage.perform(fault)


def test_there_are_enough_faults():
    assert len(FAULTS) >= 60
    assert len({os.path.basename(fault.program.__module__) for fault in FAULTS}) == len(
        {fault.program.__module__ for fault in FAULTS}
    )
