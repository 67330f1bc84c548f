"""What a callable captures: large arrays go beside its pickle, whichever way its process is started."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import threading

import numpy as np
import pytest

from scaleout_mp import CallbackNotSendable, TaskExecutor
from scaleout_mp.ipc import callables

MIB = 1 << 20


@pytest.fixture(scope="module", params=["template", pytest.param("spawn", id="fresh interpreter")])
def executor(request):
    with TaskExecutor(start_method=request.param, echo_output=False) as running:
        yield running


class Weights:
    """A callable with state that is large."""

    def __init__(self, value: float) -> None:
        self.arrays = [np.full(MIB, value), np.arange(3), np.empty(0)]
        self.text = "x" * 100_000

    def __call__(self, *, change: bool = False) -> list[float]:
        if change:
            self.arrays[0][:] = -1
        return [float(self.arrays[0].sum()), float(self.arrays[1].sum()), self.arrays[2].size, len(self.text)]

    def drop(self) -> bytes:
        """Open a file, drop the arrays and read the file."""
        with tempfile.TemporaryFile() as file:
            several = [os.dup(file.fileno()) for _ in range(20)]
            file.write(b"still here")
            self.arrays = []
            read = {os.pread(number, 10, 0) for number in (file.fileno(), *several) if not file.flush()}
            for number in several:
                os.close(number)
            return read.pop() if len(read) == 1 else b"differ"


def test_large_arrays_arrive_writable_and_each_task_has_its_own(executor):
    weights = Weights(2)
    expected = [2.0 * MIB, 3, 0, 100_000]

    assert executor.submit(weights).result(20) == expected
    assert executor.submit(weights, change=True).result(20)[0] == -MIB
    assert executor.submit(weights).result(20) == expected
    worker = executor.worker("captured")
    assert worker.submit(weights).result(20) == expected
    assert worker.submit(weights, change=True).result(20)[0] == -MIB
    worker.retire()


def test_a_task_that_drops_them_closes_no_other_file(executor):
    assert executor.submit(Weights(1).drop).result(20) == b"still here"


def test_arrays_stay_out_of_the_pickle_which_is_made_with_the_interpreters_lock_held():
    captured = [np.ones(MIB) for _ in range(4)]

    def function() -> int:
        return len(captured)

    prepared = callables.prepare(function)

    pickled, *buffers = prepared.table
    assert pickled < 10_000
    assert buffers == [8 * MIB] * 4
    assert prepared == callables.prepare(function)


def test_tracebacks_of_what_goes_by_value_have_its_file_and_its_lines(executor):
    def divide(by: int) -> float:
        return 1 / by

    report = executor.submit(divide, 0).report(20)
    assert f'File "{__file__}", line {divide.__code__.co_firstlineno + 1}, in divide' in report.traceback
    assert "return 1 / by" in report.traceback


def test_what_a_partial_captures_is_named_and_its_function_names_the_task(executor):
    def scale(by: object, number: int) -> float:
        return number if by is None else -1

    task = executor.submit(functools.partial(functools.partial(scale), None), 4)
    assert task.result(20) == 4
    assert "scale" in task.name
    with pytest.raises(CallbackNotSendable) as caught:
        executor.submit(functools.partial(scale, threading.Lock()), 4)
    assert caught.value.culprit == "argument 0, a _thread.lock"
    assert "scale" in str(caught.value)
    with pytest.raises(CallbackNotSendable, match=r"it captures number, a _thread.lock"):
        executor.submit(functools.partial(scale, None, number=threading.Lock()))


SCRIPT = """
from scaleout_mp import TaskExecutor

SCALE = 3
loaded, other, model = [], [], None

def load(value):
    global model
    loaded.append(value * SCALE)
    model = value

def predict():
    return loaded, model, SCALE

def scaled():
    return SCALE, other

if __name__ == "__main__":
    with TaskExecutor() as executor:
        worker = executor.worker("predictor", set_up=load, args=(5,))
        print(worker.submit(scaled).result(20))
        for _ in range(2):
            print(worker.submit(predict).result(20))
"""


def test_globals_of_a_script_that_a_set_up_fills_for_nobody_are_told_once(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[0] == "(3, [])"
    (line,) = done.stderr.splitlines()
    assert "load and predict are of the script itself" in line
    assert "a copy of loaded, model: what" in line


def test_globals_of_a_module_are_the_same_for_all():
    assert callables.copied_globals(fill, look) == []


FILLED = []


def fill():
    FILLED.append(1)


def look():
    return FILLED
