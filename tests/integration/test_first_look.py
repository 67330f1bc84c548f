"""The first look after a plain installation: `scaleout-mp demo` gets for itself what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import wheels
from observing import wait_until

from scaleout_mp.control import running_clients

PROJECT = Path(__file__).parents[2]
#: The command line where scikit-learn does not seem to be installed.
WITHOUT = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "sklearn" else find(name)
from scaleout_mp.cli.app import run
sys.exit(run(sys.argv[1:]))
"""
#: Makes environments as uv does. They need nothing installed: what the demo imports is where this package's needs are.
UV = """#!/bin/sh
case "$1" in
venv) exec "$3" -m venv --without-pip "$4" ;;
pip) echo "$@" > "$LOG" ; cat "$6" >> "$LOG" ;;
esac
"""


def demo(cache, uv, *arguments):
    program = cache.parent / "bin" / "uv"
    program.parent.mkdir(exist_ok=True)
    program.write_text(uv)
    program.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(cache),
        "LOG": str(cache.parent / "log"),
    }
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, "demo", *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )


def test_the_demo_goes_on_in_an_environment_of_its_own(tmp_path):
    # Of what it can do there the quickest is to say what is wrong with its options.
    first = demo(tmp_path / "cache", UV, "--rounds", "2")
    told, refused = first.stderr.splitlines()
    assert "scikit-learn>=1.5 are not installed here: making an environment" in told
    assert str(tmp_path / "cache") in told
    assert refused.startswith("error: the planned faults need at least 3 rounds")
    assert "scikit-learn>=1.5" in (tmp_path / "log").read_text()
    # Where this package lies, and what it imports: nothing else is found there.
    (folders,) = (tmp_path / "cache").glob("scaleout-mp/environments/*/lib/python*/site-packages/*.pth")
    assert folders.read_text().splitlines()[0] == str(PROJECT)
    # Once.
    (tmp_path / "log").unlink()
    second = demo(tmp_path / "cache", UV, "--rounds", "2")
    assert second.stderr == f"{refused}\n"
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("error: Failed to fetch: `https://index/simple/`", "no package index can be reached from here"),
        ("error: the disk is full", "no environment can be made for it: error: the disk is full"),
    ],
)
def test_what_cannot_be_got_is_one_line_and_leaves_nothing(tmp_path, said, told):
    done = demo(tmp_path / "cache", f"#!/bin/sh\necho '{said}'\nmkdir -p \"$4\"\nexit 1\n")
    _, line = done.stderr.splitlines()
    assert done.returncode == 2
    assert line == f'error: the demo needs what is not installed, and {told}; by hand: pip install "scikit-learn>=1.5"'
    (left,) = (tmp_path / "cache" / "scaleout-mp" / "environments").iterdir()
    assert left.suffix == ".lock"


@pytest.mark.timeout(600)
def test_demo_and_top_after_a_plain_installation(tmp_path, monkeypatch):
    """As with `pip install .` in a new environment; of wheels alone, so without a network."""
    needs = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]
    index = tmp_path / "wheels"
    index.mkdir()
    for name in wheels.needed_by(*needs, "aiohttp", "rich", "scikit-learn"):
        wheels.repack(name, index)
    ours = wheels.make_ours(PROJECT, index)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "fresh"], check=True)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "UV_"))},
        **{
            f"{tool}_{name}": value
            for tool in ("PIP", "UV")
            for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(index)))
        },
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "XDG_RUNTIME_DIR": str(tmp_path),
    }
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    fresh = tmp_path / "fresh" / "bin"

    def run(*command):
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=tmp_path)

    run(fresh / "python", "-m", "pip", "install", ours)
    assert (
        'pip install "aiohttp'
        in subprocess.run(
            [fresh / "scaleout-mp", "demo", "--no-install"],
            check=False,
            capture_output=True,
            text=True,
            env=environment,
        ).stderr
    )
    with subprocess.Popen(
        [fresh / "scaleout-mp", "demo", "--rounds", "2", "--no-faults"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=tmp_path,
    ) as process:
        try:
            wait_until(lambda: len(running_clients()) == 4, seconds=300)
            assert "client client-1" in run(fresh / "scaleout-mp", "top", "--count", "1").stdout
            output, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0, output
    assert "All came out as planned" in output
    assert "sklearn" not in run(fresh / "python", "-m", "pip", "list").stdout
    shutil.rmtree(tmp_path / "cache")
