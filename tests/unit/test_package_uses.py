"""Environments go when nobody has used them for long, and never one that is in use."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time

import pytest

from scaleout_mp.package.environment import Environments, PythonEnv
from scaleout_mp.package.uses import EnvironmentUses

DAY = 86_400
#: Makes an environment whose interpreter says yes to everything.
UV = """#!/bin/sh
[ "$1" = venv ] || exit 0
mkdir -p "$4/bin"
printf '#!/bin/sh\\n' > "$4/bin/python"
chmod +x "$4/bin/python"
"""
#: Another program that uses an environment until it is killed.
USER = """
import sys
from scaleout_mp.package.uses import EnvironmentUses
uses = EnvironmentUses(sys.argv[1])
uses.hold(sys.argv[2])
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    program = tmp_path / "uv"
    program.write_text(UV)
    program.chmod(0o755)
    monkeypatch.setattr("scaleout_mp.package.installing.shutil.which", lambda _: str(program))
    return tmp_path / "cache"


def get(environments, name):
    """Return the folder of an environment."""
    python = environments.get(PythonEnv(dependencies=(name,)), beside="/").executable
    return os.path.dirname(os.path.dirname(python))


def age(path, days):
    os.utime(f"{path}.used", (time.time() - days * DAY,) * 2)


def names_in(cache):
    return sorted(entry.name for entry in (cache / "environments").iterdir())


def files_of(*paths):
    return sorted(os.path.basename(path) + suffix for path in paths for suffix in ("", ".lock", ".used"))


def test_what_nobody_has_used_for_thirty_days_goes(cache):
    first, second, third = (get(Environments(cache), name) for name in ("one", "two", "three"))
    gc.collect()
    age(first, 31)
    age(second, 29)
    assert get(Environments(cache), "three") == third
    # Nor is anything else of it left.
    assert names_in(cache) == files_of(second, third)
    # Used again, it is not old any more, and what was removed can be made again.
    age(second, 31)
    assert get(Environments(cache), "two") == second
    assert get(Environments(cache), "one") == first
    assert names_in(cache) == files_of(first, second, third)


def test_what_is_in_use_stays_however_long(cache):
    user, others = Environments(cache), Environments(cache)
    used = get(user, "one")
    age(used, 100)
    other = get(others, "two")
    assert names_in(cache) == files_of(used, other)
    # It was in use until now.
    del user
    gc.collect()
    get(others, "two")
    assert names_in(cache) == files_of(used, other)
    age(used, 31)
    get(others, "two")
    assert names_in(cache) == files_of(other)


def test_what_another_program_uses_stays_until_that_is_killed(cache):
    used = get(Environments(cache), "one")
    gc.collect()
    command = [sys.executable, "-c", USER, os.path.dirname(used), used]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        try:
            assert program.stdout.readline() == b"\n"
            age(used, 100)
            EnvironmentUses(os.path.dirname(used)).prune()
            assert names_in(cache) == files_of(used)
        finally:
            program.kill()
            program.wait()
    EnvironmentUses(os.path.dirname(used)).prune()
    assert names_in(cache) == []


def test_what_an_earlier_release_made_has_its_thirty_days_from_now(cache):
    old = get(Environments(cache), "one")
    gc.collect()
    os.unlink(f"{old}.used")
    os.utime(old, (0, 0))
    EnvironmentUses(os.path.dirname(old)).prune()
    assert names_in(cache) == files_of(old)
    age(old, 31)
    EnvironmentUses(os.path.dirname(old)).prune()
    assert names_in(cache) == []


def test_a_removal_that_was_cut_off_is_brought_to_its_end(cache):
    kept = get(Environments(cache), "one")
    os.makedirs(os.path.join(os.path.dirname(kept), ".removed-1", "lib"))
    EnvironmentUses(os.path.dirname(kept)).prune()
    assert names_in(cache) == files_of(kept)
