"""What is done with a cgroup of version 2 that was delegated: on a real one where this machine has it."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from scaleout_mp.sandbox import cgroup, delegation


def mounted():
    """Return a cgroup2 file system and a controller that it has free, or why there is none."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.startswith("cgroup2 "):
            mount = Path(before.split()[4])
            controllers = (mount / "cgroup.controllers").read_text().split()
            if controllers and os.access(mount, os.W_OK):
                return mount, controllers[0]
    return None


@pytest.fixture
def group():
    """Give a group that passes nothing on, has a process in it, and a controller to pass on."""
    found = mounted()
    if found is None:
        pytest.skip("no cgroup of version 2 that has a controller can be written to here")
    mount, controller = found
    if controller not in (mount / "cgroup.subtree_control").read_text().split():
        try:
            (mount / "cgroup.subtree_control").write_text(f"+{controller}")
        except OSError as error:
            pytest.skip(f"{mount} does not pass {controller} on: {error}")
        undo = f"-{controller}"
    else:
        undo = None
    folder = mount / f"scaleout-mp-test-{secrets.token_hex(4)}"
    folder.mkdir()
    process = subprocess.Popen(["sleep", "1000"])
    (folder / "cgroup.procs").write_text(str(process.pid))
    try:
        yield folder, controller, process.pid
    finally:
        process.kill()
        process.wait()
        for place in (folder / delegation.LEAF, folder):
            remove(place)
        if undo is not None:
            # Another test may be using it.
            with contextlib.suppress(OSError):
                (mount / "cgroup.subtree_control").write_text(undo)


def remove(folder):
    deadline = time.monotonic() + 5
    while folder.exists():
        # Busy until the last process has left.
        with contextlib.suppress(OSError):
            folder.rmdir()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_is_in_a_delegated_group_makes_room(group, monkeypatch):
    folder, controller, pid = group
    monkeypatch.setattr(delegation, "is_delegated", lambda path: path == str(folder))
    delegation.pass_on(str(folder), controller)
    assert controller in (folder / "cgroup.subtree_control").read_text().split()
    assert (folder / delegation.LEAF / "cgroup.procs").read_text().split() == [str(pid)]
    assert delegation.delegated(str(folder / delegation.LEAF)) == str(folder)
    # A second one finds it done.
    delegation.pass_on(str(folder), controller)


def test_a_group_that_nobody_delegated_is_left_alone(group, monkeypatch):
    folder, controller, pid = group
    monkeypatch.setattr(delegation, "is_delegated", lambda _: False)
    with pytest.raises(OSError, match="does not pass"):
        delegation.pass_on(str(folder), controller)
    assert (folder / "cgroup.procs").read_text().split() == [str(pid)]
    assert not (folder / delegation.LEAF).exists()


def test_root_owning_a_group_does_not_make_it_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "getxattr", lambda *_: b"0")
    assert not delegation.is_delegated(str(tmp_path))
    monkeypatch.setattr(os, "getxattr", lambda _, name: b"1" if name == "user.delegate" else b"0")
    assert delegation.is_delegated(str(tmp_path))


@pytest.mark.parametrize(
    ("marked", "own", "found"),
    [
        ("service", "service", "service"),
        ("service", "service/client", "service"),
        ("service", "service/supervisor", "service"),
        ("nothing", "service/client", "service/client"),
    ],
)
def test_where_groups_go(monkeypatch, marked, own, found):
    monkeypatch.setattr(delegation, "is_delegated", lambda path: path.endswith(marked))
    assert delegation.delegated(f"/sys/fs/cgroup/{own}") == f"/sys/fs/cgroup/{found}"


def test_a_user_owns_the_top_of_what_was_delegated_and_not_every_group_below(tmp_path, monkeypatch):
    below = tmp_path / "service" / "shell.scope"
    below.mkdir(parents=True)
    owners = {str(tmp_path): 0, str(tmp_path / "service"): 1000, str(below): 1000}
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "stat", lambda path, **_: SimpleNamespace(st_uid=owners[str(path)]))
    assert delegation.is_delegated(str(tmp_path / "service"))
    assert not delegation.is_delegated(str(below))


def test_a_group_is_killed_at_once_with_all_that_is_in_it(group):
    folder, _, pid = group
    descriptor = os.pidfd_open(pid)

    cgroup.kill_all(str(folder))

    try:
        assert select.select([descriptor], [], [], 10)[0]
    finally:
        os.close(descriptor)
