"""Copies of the package for environments: as many as are used, and a few more."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

import scaleout_mp
from scaleout_mp.package.copies import PackageCopies

#: Another program that uses a copy for as long as its input is open.
USER = """
import sys
import scaleout_mp
from scaleout_mp.package.copies import PackageCopies
scaleout_mp.__file__ = sys.argv[2]
copies = PackageCopies(sys.argv[1])
print(copies.current(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A small package in place of the whole of this one."""
    folder = tmp_path / "source" / "scaleout_mp"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    monkeypatch.setattr(scaleout_mp, "__file__", str(folder / "__init__.py"))
    return folder


def change(source, number):
    (source / "state.py").write_text("x" * number)


def copies_in(folder):
    return {path.name for path in folder.iterdir() if path.is_dir()}


def test_a_copy_is_made_once_for_each_state(tmp_path, source):
    change(source, 1)
    first = PackageCopies(str(tmp_path / "copies")).current()
    assert os.listdir(os.path.join(first, "scaleout_mp")) == os.listdir(source)
    assert PackageCopies(str(tmp_path / "copies")).current() == first
    change(source, 2)
    assert PackageCopies(str(tmp_path / "copies")).current() != first


def test_the_last_ones_stay_and_those_in_use(tmp_path, source):
    folder = tmp_path / "copies"
    change(source, 1)
    command = [sys.executable, "-c", USER, str(folder), scaleout_mp.__file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as user:
        used = user.stdout.readline().strip()
        made = []
        for number in range(2, 9):
            change(source, number)
            made.append(os.path.basename(PackageCopies(str(folder)).current()))
        assert copies_in(folder) == {os.path.basename(used), *made[-4:]}
        user.stdin.close()
    change(source, 9)
    last = os.path.basename(PackageCopies(str(folder)).current())
    assert copies_in(folder) == {*made[-3:], last}
    # Nor is anything else of them left.
    assert {path.stem for path in folder.glob("*.lock")} == {*made[-3:], last}


def test_what_a_killed_program_left_goes_after_a_while(tmp_path, source):
    folder = tmp_path / "copies"
    for name, age in (("tmpold", 7200), ("tmpnew", 0)):
        (folder / name / "root").mkdir(parents=True)
        os.utime(folder / name, (time.time() - age,) * 2)
    current = os.path.basename(PackageCopies(str(folder)).current())
    assert copies_in(folder) == {"tmpnew", current}
