"""Programs without standard input, output or error, as daemons are: their tasks run like others."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, os, sys
from scaleout_mp import TaskExecutor

def speak():
    print("to output", flush=True)
    os.write(2, b"to error\\n")
    return [os.path.exists(f"/proc/self/fd/{number}") for number in range(3)]

def fail():
    print("last words", flush=True)
    raise RuntimeError

said = {}
for method in ("template", "spawn"):
    # A loop's descriptors have taken the numbers before anything of ours can.
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(int(sys.argv[2]))]
    with TaskExecutor(start_method=method, preload=[], echo_output=True) as executor:
        said[method] = [executor.submit(speak).result(20), executor.submit(fail).report(20).stdout_tail]
    for descriptor in held:
        os.close(descriptor)
with open(sys.argv[1], "w") as file:
    json.dump(said, file)
"""


def start(redirection, arguments, folder, stdout=subprocess.PIPE):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # With it nothing stays in a buffer.
    environment.pop("PYTHONUNBUFFERED", None)
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
        cwd=folder,
        env=environment,
    )


@pytest.mark.parametrize(
    ("redirection", "held"), [("<&-", 0), (">&-", 0), ("2>&-", 0), ("<&- >&- 2>&-", 0), (">&- 2>&-", 2)]
)
def test_tasks_of_a_program_without_streams(tmp_path, redirection, held):
    program, said = tmp_path / "program.py", tmp_path / "said"
    program.write_text(PROGRAM)
    run = start(redirection, ["program.py", str(said), str(held)], tmp_path)
    assert run.returncode == 0, run.stderr
    assert json.loads(said.read_text()) == {method: [[True] * 3, "last words\n"] for method in ("template", "spawn")}
    if redirection == "<&-":
        assert run.stdout.count("to output\n") == 2
    if ">&-" not in redirection.replace("2>&-", ""):
        assert run.stdout.count("last words\n") == 2


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_the_command_line_without_streams(tmp_path, redirection):
    (tmp_path / "job.py").write_text("def ok():\n    print('said')\n    return {'loss': 0.5}\n")
    run = start(redirection, ["-m", "scaleout_mp", "run", "job.py:ok", "--output", "out.json"], tmp_path)
    assert (run.returncode, "Traceback" in run.stderr) == (0, False), run.stderr
    assert json.loads((tmp_path / "out.json").read_text()) == {"loss": 0.5}


def test_what_cannot_be_printed_at_a_load_costs_no_task(tmp_path):
    """As in `python program.py | head -1`: what a module prints stays in the template's buffer."""
    (tmp_path / "loud.py").write_text("print('imported')\ndef one():\n    return 1\n")
    (tmp_path / "program.py").write_text(
        "import json, sys\nfrom scaleout_mp import TaskExecutor\nsys.stdout = None\nimport loud\n"
        "with TaskExecutor(echo_output=False) as executor:\n"
        "    said = [executor.submit(loud.one).result(20) for _ in range(2)]\n"
        "with open('said', 'w') as file:\n    json.dump(said, file)\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    try:
        run = start("", ["program.py"], tmp_path, stdout=writer)
    finally:
        os.close(writer)
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "said").read_text()) == [1, 1]
