"""`scaleout-mp run`, as people and machines use it."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scaleout_mp import ScaleoutModel

TESTS = Path(__file__).parents[1]
FILE = f"{TESTS / 'job_programs.py'}"


def command(*arguments):
    return [sys.executable, "-m", "scaleout_mp", "run", *map(str, arguments)]


def run(*arguments, cwd, **options):
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=60, check=False, cwd=cwd, **options
    )


@pytest.fixture
def seed(tmp_path):
    np.savez(tmp_path / "seed.npz", np.zeros((2, 2)), np.arange(3))
    return tmp_path / "seed.npz"


@pytest.mark.parametrize("sandbox", ["auto", "none", "basic", "strict"])
def test_a_model_is_trained(tmp_path, seed, sandbox):
    done = run(
        f"{FILE}:train",
        *("--model", seed, "--set", "epochs=3", "--memory", "1GiB", "--wall-time", "1h"),
        *("--sandbox", sandbox, "--output", "out.scm"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    said, result = done.stdout.splitlines()
    assert said == "about to train"
    assert json.loads(result)["settings"] == {"epochs": 3}
    with ScaleoutModel.from_file(tmp_path / "out.scm") as model:
        np.testing.assert_array_equal(model.get_training_model()[0], np.ones((2, 2)))
    assert "completed in " in done.stderr
    assert "loss 0.33333" in done.stderr
    assert done.stderr.splitlines()[-1] == "the result is in out.scm"


def test_a_module_is_found_where_one_stands(tmp_path):
    (tmp_path / "own_jobs.py").write_text("def answer():\n    return 42\n")
    done = run("own_jobs:answer", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "42\n")


def test_lines_for_machines(tmp_path, seed):
    done = run(f"{FILE}:train", "--model", seed, "--set", "epochs=2", "--output", "out.npz", "--json", cwd=tmp_path)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["state"] for event in events if event["event"] == "state"] == ["starting", "running", "ended"]
    metrics = [(event["step"], event["metrics"]) for event in events if event["event"] == "metric"]
    assert metrics == [(0, {"loss": 1.0, "runaway": None}), (1, {"loss": 0.5, "runaway": None})]
    end = events[-1]
    assert (end["event"], end["exit_code"], end["output"], end["problem"]) == ("end", 0, "out.npz", None)
    assert end["report"]["reason"] == "completed"
    assert end["result"]["settings"] == {"epochs": 2}
    # What it prints does not stand between them.
    assert done.stderr == "about to train\n"


@pytest.mark.parametrize(
    ("function", "options", "code", "says"),
    [
        ("raise_error", (), 1, "raised ValueError: the learning rate is negative"),
        ("crash", (), 3, "crashed with SIGSEGV"),
        ("allocate", ("--memory", "128MiB"), 4, "memory limit of 128 MiB"),
        ("spin", ("--wall-time", "0.5s", "--abort-grace", "0.1"), 5, "wall-clock limit of 0.5 s"),
        ("spin", ("--cpu-time", "0.5"), 6, "0.5 s of processor time"),
        ("spin", ("--no-progress", "0.5", "--abort-grace", "0.1s"), 7, "no progress for 0.5 s"),
    ],
)
def test_the_exit_code_says_how_it_ended(tmp_path, function, options, code, says):
    done = run(f"{FILE}:{function}", *options, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert re.search("why-was-my-task-killed.md#[a-z-]+", done.stderr)
    assert done.stdout == ""
    # Nothing is said twice.
    assert done.stderr.count(says) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("no_such_module:train",), "there is no module no_such_module"),
        ((f"{FILE}:nothing",), "job_programs.py has no nothing"),
        ((f"{FILE}:NUMBER",), "is not callable but of type int"),
        (("train",), "does not name a function"),
        (("nowhere.py:train",), "there is no file nowhere.py"),
        ((f"{FILE}:add", "--set", "a"), "say NAME=VALUE"),
        ((f"{FILE}:add", "--set", "c=1"), "cannot be called with the settings c"),
        ((f"{FILE}:train", "--model", "nowhere.npz"), "there is no file nowhere.npz"),
        ((f"{FILE}:train", "--model", FILE), "neither a model file nor an .npz file"),
        ((f"{FILE}:add", "--memory", "much"), "memory must be a number of bytes or a size"),
        ((f"{FILE}:add", "--output", "nowhere/out.scm"), "no file can be written there"),
        ((f"{FILE}:add", "--affinity", "x"), "affinity must be numbers"),
        ((f"{FILE}:add", "--nice", "50"), "nice must be a whole number from 0 to 19"),
        ((f"{FILE}:add", "--read", "."), 'read, write and network are for level "strict"'),
        ((f"{FILE}:add", "--working-directory", "nowhere"), "there is no folder"),
    ],
)
def test_wrong_usage_is_one_clear_line(tmp_path, arguments, says):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert says in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("code", "says", "frames"),
    [
        ("import nothing_there\n", "ModuleNotFoundError: No module named 'nothing_there'", 1),
        ("def train(:\n", "SyntaxError: invalid syntax", 1),
        (
            "from scaleout_mp import EdgeClient\nEdgeClient().connect_to_api('http://127.0.0.1:9')\n",
            'does so below `if __name__ == "__main__":`',
            1,
        ),
        ("def train():\n    return object()\n", "a builtins.object cannot be returned from a task", 0),
    ],
)
def test_what_a_file_does_wrong_is_a_line_and_its_own_traceback(tmp_path, code, says, frames):
    (tmp_path / "job.py").write_text(code)
    done = run("job.py:train", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    line, *trace = done.stderr.splitlines()
    assert line.startswith("task job.py:train: raised ")
    assert says in line
    # Nothing of how it was loaded, or of how we came to raise.
    shown = [text for text in trace if text.startswith("  File ")]
    assert len(shown) == frames, done.stderr
    assert all(str(tmp_path / "job.py") in text for text in shown)


def test_a_result_that_cannot_be_kept_is_shown_and_an_error(tmp_path):
    done = run(f"{FILE}:add", "--set", "a=1", "--output", "out.scm", cwd=tmp_path)
    assert done.returncode == 1
    assert json.loads(done.stdout) == {"sum": 3}
    assert "error: the result is not kept" in done.stderr


def test_where_it_starts_and_what_it_finds(tmp_path):
    def where(*options):
        done = run(f"{FILE}:where", *options, cwd=tmp_path, env={**os.environ, "JOB_VARIABLE": "outside"})
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert where()["folder"] == str(tmp_path)
    assert where()["variable"] is None
    assert where("--pass-env", "JOB_VARIABLE")["variable"] == "outside"
    assert where("--env", "JOB_VARIABLE=inside")["variable"] == "inside"
    assert where("--sandbox", "strict")["folder"] != str(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    assert where("--working-directory", "elsewhere")["folder"] == str(tmp_path / "elsewhere")


def test_a_declared_file_can_be_read_at_level_strict(tmp_path):
    (tmp_path / "data.txt").write_text("data")
    path = tmp_path / "data.txt"
    allowed = run(f"{FILE}:read", "--set", f"path={path}", "--sandbox", "strict", "--read", path, cwd=tmp_path)
    assert (allowed.returncode, allowed.stdout) == (0, '"data"\n'), allowed.stderr


@pytest.mark.parametrize(
    ("number", "heed", "times", "code", "how"),
    [
        (signal.SIGINT, "true", 1, 130, "it ended by itself"),
        (signal.SIGTERM, "true", 1, 143, "it ended by itself"),
        (signal.SIGINT, "false", 2, 130, "killed with SIGKILL"),
    ],
)
def test_ctrl_c_asks_it_to_stop_and_the_second_kills_it(tmp_path, number, heed, times, code, how):
    arguments = command(f"{FILE}:wait_forever", "--set", f"heed={heed}", "--abort-grace", "30s")
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        if times == 2:
            while "asking it to stop" not in process.stderr.readline():
                pass
            process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == code, errors
    assert how in errors


def test_a_live_line_on_a_terminal(tmp_path, seed):
    ours, theirs = pty.openpty()
    arguments = command(
        f"{FILE}:train_slowly", "--model", seed, *("--set", "pause=0.3", "--set", "epochs=5", "--memory", "512MiB")
    )
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=theirs, text=True, cwd=tmp_path, env={**os.environ, "TERM": "xterm"}
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                data = os.read(ours, 4096)
            except OSError:
                # The other end is closed.
                break
            if not data:
                break
            shown += data
        os.close(ours)
        assert process.stdout.read() == "5\n"
    assert process.returncode == 0
    text = shown.decode()
    assert "\x1b[2K" in text
    assert re.search(r"running {2}\d s {2}memory .* of 512 MiB \(\d+%\) {2}step \d {2}loss", text)
    assert "completed in" in text
