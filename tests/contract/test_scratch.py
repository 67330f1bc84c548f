"""The folder that each task has to itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile

import pytest
import scratch_programs as programs
from observing import wait_until
from test_strict import needs_namespaces

from scaleout_mp import ConfigError, EndReason, Limits, TaskExecutor, TaskFailed
from scaleout_mp.sandbox.scratch import ScratchFolders
from scaleout_mp.task import StopStage

LEVELS = ("none", "basic", "auto", "strict")


@pytest.fixture(params=["template", "spawn"])
def start_method(request):
    return request.param


@pytest.fixture(params=LEVELS)
def level(request):
    return request.param


@pytest.fixture
def base(tmp_path):
    """Where scratch folders are made; nothing is left there after a test."""
    folder = tmp_path / "base"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


def folders(base):
    """The scratch folders of tasks below the bases of all supervisors, without those of templates."""
    return [path for path in base.glob("scaleout-scratch-*/*") if path.name != "template"]


def test_each_task_has_an_empty_folder_of_its_own(base, level, start_method):
    with TaskExecutor(sandbox=level, start_method=start_method, echo_output=False, scratch_folder=base) as executor:
        first, second = (executor.submit(programs.look_around).result(20) for _ in range(2))
        assert folders(base) == []
    for seen in (first, second):
        assert seen["TMPDIR"] == seen["TMP"] == seen["TEMP"] == seen["tempfile"]
        assert os.path.dirname(os.path.dirname(seen["TMPDIR"])) == str(base)
        assert seen["temp folder"] == []
        assert stat.S_IMODE(seen["mode"]) == stat.S_IMODE(seen["mode of base"]) == 0o700
        assert seen["child's TMPDIR"] == seen["TMPDIR"]
        assert seen["cwd"] == (os.getcwd() if level == "none" else seen["TMPDIR"])
    assert first["TMPDIR"] != second["TMPDIR"]


def test_where_tasks_start_can_be_chosen(base, tmp_path, level, monkeypatch):
    for wanted, expected in (("inherit", os.getcwd()), (tmp_path, str(tmp_path)), ("scratch", None)):
        with TaskExecutor(sandbox=level, echo_output=False, scratch_folder=base, working_directory=wanted) as executor:
            seen = executor.submit(programs.look_around).result(20)
            assert seen["cwd"] == (expected or seen["TMPDIR"])


def test_modules_are_found_from_there(base, tmp_path, start_method):
    (tmp_path / "beside.py").write_text("def answer():\n    return 42\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom scaleout_mp import TaskExecutor\n"
        "def late():\n    import beside\n    return beside.answer()\n"
        "if __name__ == '__main__':\n"
        "    sys.path[0] = '.'\n"
        f"    with TaskExecutor(start_method={start_method!r}, scratch_folder={str(base)!r}) as executor:\n"
        "        print(executor.submit(late).result(20))\n"
    )
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("42\n", "")


@pytest.mark.parametrize("program", programs.LITTER, ids=lambda program: program.__name__)
def test_whatever_is_left_in_it_goes(base, tmp_path, program):
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "file").write_text("kept")
    with TaskExecutor(echo_output=False, scratch_folder=base) as executor:
        report = executor.submit(program, str(beside)).report(60)
        wait_until(lambda: folders(base) == [], seconds=20, what="no scratch folder is left")
        assert report.reason is EndReason.COMPLETED, report.explain()
        assert executor.submit(programs.look_around).result(20)["temp folder"] == []
    assert (beside / "file").read_text() == "kept"
    assert stat.S_IMODE(beside.stat().st_mode) == 0o755


@needs_namespaces
@pytest.mark.parametrize("what", ["top", "sub", "deep", "other"])
def test_what_is_mounted_in_it_is_left_and_named(tmp_path, what):
    base, beside = tmp_path / "base", tmp_path / "beside"
    base.mkdir()
    (beside / "sub").mkdir(parents=True, mode=0o755)
    (beside / "kept").write_text("kept")
    (beside / "sub" / "file").write_text("kept")
    (beside / "sub" / "large").write_bytes(bytes(2 << 20))
    beside.chmod(0o555)
    command = [sys.executable, "-c", programs.MOUNTING, str(base), str(beside), what]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=True)
    seen = json.loads(done.stdout)
    (path,) = seen["left"]
    assert not seen["gone"]
    assert len(seen["warned"]) == 2
    assert all("something is mounted there, which is left as it is: " in text for text in seen["warned"])
    assert seen["warned"][-1].endswith(f": {path!r}")
    assert seen["inside"] == (["kept"] if what == "other" else ["kept", "sub"])
    # What is mounted takes nothing of the task's limit; on top of all, it would hide what the task has.
    assert seen["small"]
    assert seen["unmeasured"] == ("another folder that is mounted on it" if what == "top" else "")
    # All the rest of it goes.
    assert not seen["own"]
    assert (beside / "kept").read_text() == (beside / "sub" / "file").read_text() == "kept"
    assert stat.S_IMODE(beside.stat().st_mode) == 0o555
    beside.chmod(0o755)
    # The mounts were those of that process.
    folders = ScratchFolders.make_base(base)
    folders.remove_left_over()
    folders.close()
    assert list(base.iterdir()) == []


def test_what_cannot_be_changed_in_it_goes(base):
    with TaskExecutor(sandbox="none", echo_output=False, scratch_folder=base) as executor:
        problem = executor.submit(programs.make_immutable).result(30)
        if problem is not None:
            pytest.skip(f"nothing can be made immutable here: {problem}")
        wait_until(lambda: folders(base) == [], what="its removal")


@pytest.mark.parametrize("program", [programs.crash, programs.hang], ids=lambda program: program.__name__)
def test_it_goes_however_the_task_ends(base, program):
    with TaskExecutor(echo_output=False, scratch_folder=base, limits=Limits(abort_grace=0)) as executor:
        task = executor.submit(program)
        next(task.records())
        task.abort()
        task.report(20)
        wait_until(lambda: folders(base) == [], what="no scratch folder is left")


def test_a_base_that_was_cleared_away_is_made_anew(base):
    with TaskExecutor(echo_output=False, scratch_folder=base) as executor:
        executor.submit(programs.look_around).result(20)
        (old,) = base.iterdir()
        old.chmod(0)
        assert executor.submit(programs.look_around).result(20)["temp folder"] == []
        old.rename(base.parent / "elsewhere")
        seen = executor.submit(programs.look_around).result(20)
        assert os.path.dirname(os.path.dirname(seen["TMPDIR"])) == str(base)


def test_nothing_is_missed_when_all_of_it_is_gone_at_the_end(tmp_path):
    parent = tmp_path / "gone"
    parent.mkdir()
    with TaskExecutor(echo_output=False, scratch_folder=parent) as executor:
        executor.submit(programs.look_around).result(20)
        shutil.rmtree(parent)
    assert not parent.exists()


def test_a_worker_keeps_its_folder_and_its_bound(base):
    limits = Limits(scratch_size="32MiB")
    with TaskExecutor(isolation="worker", echo_output=False, scratch_folder=base, limits=limits) as executor:
        first, second = (executor.submit(programs.look_around, worker="w").result(20) for _ in range(2))
        assert first["TMPDIR"] == second["TMPDIR"]
        assert len(folders(base)) == 1
        report = executor.submit(programs.fill_one_file, worker="w").report(60)
        assert report.reason is EndReason.SCRATCH_SIZE
        assert executor.submit(programs.look_around, worker="w").result(20)["TMPDIR"] != first["TMPDIR"]
    assert folders(base) == []


def test_what_a_killed_supervisor_left_goes(base):
    command = [sys.executable, "-c", programs.SUPERVISOR, str(base)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as supervisor:
        assert supervisor.stdout.readline() == "at work\n"
        (left,) = folders(base)
        with TaskExecutor(echo_output=False, scratch_folder=base) as executor:
            executor.submit(programs.look_around).result(20)
        # It lives: what is its own stays.
        assert (left / "data").exists()
        supervisor.kill()
        # The guardian outlives it.
        wait_until(lambda: not left.parent.exists(), what="the folder of the killed supervisor is gone")


def test_what_supervisor_and_guardian_left_goes_with_the_next_start(base):
    left = base / "scaleout-scratch-0123abcd"
    (left / "7" / "folder").mkdir(parents=True)
    (left / "7" / "folder" / "file").write_text("x")
    link = base / "scaleout-scratch-89abcdef"
    link.symlink_to(left.parent.parent)
    others = [base / name for name in ("scaleout-mp-0", "scaleout-scratch-results", "scaleout-scratch-0123abcd.old")]
    for other in others:
        (other / "folder").mkdir(parents=True)
    with TaskExecutor(echo_output=False, scratch_folder=base) as executor:
        executor.submit(programs.look_around).result(20)
        wait_until(lambda: not left.exists(), what="the left folder is gone")
    # Whatever has another name is somebody's.
    for other in others:
        (other / "folder").rmdir()
        other.rmdir()
    link.unlink()


def test_a_file_that_is_not_found_from_there_is_explained(base, start_method):
    with (
        TaskExecutor(start_method=start_method, echo_output=False, scratch_folder=base) as executor,
        pytest.raises(TaskFailed, match=r"'data/train.npz' in the task's scratch folder; working_directory="),
    ):
        executor.submit(programs.open_relative).result(20)
    with TaskExecutor(echo_output=False, scratch_folder=base, working_directory="inherit") as executor:
        assert "working_directory" not in executor.submit(programs.open_relative).report(20).message


@pytest.mark.parametrize("sandbox", ["basic", "strict"])
@pytest.mark.parametrize("program", programs.FILLING, ids=lambda program: program.__name__)
def test_too_much_in_it_ends_the_task(base, program, sandbox):
    limits = Limits(scratch_size="4MiB" if program is programs.fill_with_small_files else "32MiB", abort_grace=5)
    with TaskExecutor(sandbox=sandbox, echo_output=False, scratch_folder=base, limits=limits) as executor:
        report = executor.submit(program).report(60)
        assert report.reason is EndReason.SCRATCH_SIZE
        assert report.stopped_by is StopStage.SIGKILL
        assert "docs/why-was-my-task-killed.md#scratch-size" in report.explain()
        if program is programs.go_deep:
            assert "nested more than 64 deep" in report.message
        else:
            assert re.match(r"has \d.* or more in its scratch folder, its limit is (32.0|4.0) MiB;", report.message)
        wait_until(lambda: folders(base) == [], seconds=20, what="no scratch folder is left")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_measured_ends_the_task(base):
    with TaskExecutor(echo_output=False, scratch_folder=base, limits=Limits(scratch_size="1GiB")) as executor:
        report = executor.submit(programs.close_it).report(30)
        assert report.reason is EndReason.SCRATCH_SIZE
        assert "folders that cannot be read" in report.message


def test_files_count_once_and_by_what_they_take(base):
    with TaskExecutor(echo_output=False, scratch_folder=base, limits=Limits(scratch_size="4MiB")) as executor:
        assert executor.submit(programs.stay_below, 3 << 20).result(20) is True


def test_folders_that_cannot_work_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"scratch_folder: there is no folder '.*missing'"):
        TaskExecutor(scratch_folder=tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"working_directory: there is no folder 'nowhere'"):
        TaskExecutor(working_directory="nowhere")
    with pytest.raises(ConfigError, match=r"working_directory must be a path, not 5"):
        TaskExecutor(working_directory=5)
    folder = tmp_path / "file"
    folder.mkdir()
    executor = TaskExecutor(scratch_folder=folder)
    folder.rmdir()
    with pytest.raises(ConfigError, match=r"no scratch folders can be made in '.*file'.*scratch_folder="):
        executor.submit(programs.look_around)


def test_the_temp_folder_is_the_default(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with TaskExecutor(echo_output=False) as executor:
        seen = executor.submit(programs.look_around).result(20)
    assert os.path.dirname(os.path.dirname(seen["TMPDIR"])) == str(tmp_path)
    assert list(tmp_path.iterdir()) == []
