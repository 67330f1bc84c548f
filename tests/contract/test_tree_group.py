"""The cgroup around an executor's processes, where one can be made: it holds still whoever forks and leaves."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import programs
import pytest
from observing import wait_until

from scaleout_mp import Limits, TaskExecutor
from scaleout_mp.executor import stopping
from scaleout_mp.executor.watchdog import TreeWatch
from scaleout_mp.sandbox import tree
from scaleout_mp.sandbox.cgroup import find_tree_group
from scaleout_mp.sandbox.tree_group import TreeGroup
from scaleout_mp.task import EndReason, TaskState

CHAINS = 4


@pytest.fixture
def group():
    try:
        made = find_tree_group(None)
    except OSError as error:
        pytest.skip(f"no cgroup of version 2 can be made: {error}")
    yield made
    made.kill(lambda _: True)
    wait_until(lambda: not made.members(), what="the end of all in the group")
    made.remove()
    assert not os.path.exists(made.folder)


#: Joins the group FOLDER, wears the tag TAG, and either sleeps or leaves processes that fork and leave.
PROGRAM = """
import mmap, os, sys, time
from scaleout_mp.sandbox import tree
from scaleout_mp.sandbox.tree_group import TreeGroup

folder, tag, chains, file = sys.argv[1:]
TreeGroup(folder).join()
if int(tag):
    tree.wear_tag(int(tag))
if not int(chains):
    print(flush=True)
    time.sleep(100)
with open(file, "r+b") as opened:
    count = mmap.mmap(opened.fileno(), 1)
for _ in range(int(chains)):
    if os.fork() == 0:
        break
else:
    os._exit(0)
while True:
    if os.fork():
        os._exit(0)
    os.setsid()
    count[0] = (count[0] + 1) % 256
"""


def start(group, *, tag=0, chains=0, file="", output=None):
    command = [sys.executable, "-c", PROGRAM, group.folder, str(tag), str(chains), str(file)]
    return subprocess.Popen(command, stdout=output)


def start_sleeper(group, tag=0):
    sleeper = start(group, tag=tag, output=subprocess.PIPE)
    assert sleeper.stdout.readline() == b"\n"
    return sleeper


@pytest.fixture
def chains(group, tmp_path):
    """Processes that fork and leave as fast as they can, each in a process group of its own; they count."""
    tag, file = tree.new_tag(), tmp_path / "count"
    file.write_bytes(b"\0")
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 1) as count:
        with start(group, tag=tag, chains=CHAINS, file=file) as first:
            assert first.wait(20) == 0
        wait_until(lambda: count[0] > 0, what="the first that has left")
        yield tag, count
        group.kill(lambda _: True)


def changes(count):
    """Whether somebody counts, within a tenth of a second."""
    before, deadline = count[:1], time.monotonic() + 0.1
    while time.monotonic() < deadline:
        if count[:1] != before:
            return True
        time.sleep(0.001)
    return False


def test_what_is_held_still_does_nothing_and_goes_on_after(group, chains):
    _, count = chains
    with group.still():
        assert not changes(count)
        members = group.members()
        assert members
        assert group.members() == members
    wait_until(lambda: changes(count), what="somebody who counts")


def test_who_forks_and_leaves_is_killed_in_one_go(group, chains):
    tag, count = chains
    assert tree.kill_held(tag, group, gentle=False)
    wait_until(lambda: not group.members(), seconds=2, what="the end of all that were killed")
    assert not changes(count)


def test_the_tag_and_the_group_find_all_but_others(group, chains):
    tag, count = chains
    with start_sleeper(group) as other:
        assert tree.kill_tagged(tag, group=group) > 0
        assert not changes(count)
        assert group.members() == [other.pid]
        other.kill()


def test_nobody_is_held_still_for_those_who_only_take_their_time_to_go(group, monkeypatch):
    tag = tree.new_tag()
    with start_sleeper(group, tag) as sleeper:
        assert not tree._is_leaving(sleeper.pid)
        with monkeypatch.context() as patch:
            patch.setattr(tree, "_is_leaving", lambda pid: pid == sleeper.pid)
            patch.setattr(TreeGroup, "still", None)
            assert tree.kill_held(tag, group, gentle=False) == []
        assert tree.kill_held(tag, group, gentle=False) == [sleeper.pid]
        assert sleeper.wait(5) == -signal.SIGKILL
        assert tree._is_leaving(sleeper.pid)


def test_a_signal_goes_to_those_with_the_tag(group):
    tag = tree.new_tag()
    with start_sleeper(group, tag) as wearer, start_sleeper(group) as other:
        assert tree.signal_tagged(tag, signal.SIGTERM, group) == 1
        assert wearer.wait(5) == -signal.SIGTERM
        assert other.poll() is None
        other.kill()


def test_a_group_that_is_gone_kills_nobody(tmp_path):
    assert TreeGroup(str(tmp_path / "none")).kill(lambda _: True) == []


def groups_of(pid, around):
    return [f"{around}/{name}" for name in os.listdir(around) if name.startswith(f"scaleout-mp-{pid}-")]


def test_tasks_are_in_it_and_it_goes_with_the_executor(group):
    around = os.path.dirname(group.folder)
    with TaskExecutor(echo_output=False) as executor:
        task = executor.submit(programs.wait_for_godot, limits=Limits(abort_grace=0))
        wait_until(lambda: task.state is TaskState.RUNNING, what="the task")
        (own,) = set(groups_of(os.getpid(), around)) - {group.folder}
        assert TreeGroup(own).members()
        task.abort()
        assert TreeGroup.NAME in task.report(10).layers
    assert groups_of(os.getpid(), around) == [group.folder]


def hold_still():
    """Hold still all that this process is in, with all privileges that it has."""
    own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))[3:]
    around = next(
        line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if line.split()[2] == "cgroup2"
    )
    Path(f"{around}{own}/cgroup.freeze").write_text("1")
    programs.wait_for_godot()


def test_a_task_that_holds_the_template_still_can_be_aborted(group):
    with TaskExecutor(echo_output=False, sandbox="none") as executor:
        task = executor.submit(hold_still, limits=Limits(abort_grace=0))
        wait_until(lambda: "frozen 1" in own_events(group), what="what is held still")
        task.abort()
        assert task.report(10).reason is EndReason.INTERRUPTED_BY_CLIENT
        assert executor.submit(programs.echo, 1).result(10) == 1


def own_events(group):
    (own,) = set(groups_of(os.getpid(), os.path.dirname(group.folder))) - {group.folder}
    return "".join(path.read_text() for path in Path(own).glob("template-*/cgroup.events"))


def test_nothing_of_it_is_left_of_a_client_that_was_killed(group):
    around = os.path.dirname(group.folder)
    program = (
        "import time, programs\n"
        "from scaleout_mp import TaskExecutor\n"
        "if __name__ == '__main__':\n"
        "    with TaskExecutor() as executor:\n"
        "        executor.submit(programs.wait_for_godot)\n"
        "        print('started', flush=True)\n"
        "        time.sleep(100)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as client:
        try:
            started = client.stdout.readline()
            (own,) = groups_of(client.pid, around)
        finally:
            client.kill()
    assert started == b"started\n"
    # The folder itself is left for a next start where the guardian heard of the end before that showed.
    wait_until(lambda: not TreeGroup(own).members(), what="the end of all that the client had")


def test_a_task_with_thousands_of_processes_does_not_hold_up_the_loop(monkeypatch):
    looked_at = []
    monkeypatch.setattr(stopping.tree, "is_tracker", looked_at.append)
    with TaskExecutor(echo_output=False) as executor:
        task = executor.submit(programs.wait_for_godot, limits=Limits(abort_grace=0))
        wait_until(lambda: task.state is TaskState.RUNNING, what="the task")
        # As a look may leave it; these are nobody's.
        nobody = list(range(1 << 23, (1 << 23) + 5000))
        monkeypatch.setattr(TreeWatch, "pids", property(lambda _: nobody, lambda *_: None), raising=False)
        task.abort()
        assert task.report(10).reason is EndReason.INTERRUPTED_BY_CLIENT
    assert 0 < len(looked_at) < 200
